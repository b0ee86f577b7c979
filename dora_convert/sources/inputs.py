"""From what a caller names to open headers: adapters, and the base they belong to."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import MalformedError, RefError, UnsupportedError, UsageError
from ..formats.detect import FORMATS
from ..storage.checkpoint import Checkpoint, read_weights
from ..storage.filenames import OF_TRAINING, is_weight_file
from ..storage.json_files import read_json
from ..storage.refs import HubRef, Source, local_path, parse_ref
from .download import fetch, wanted_of_adapter
from .remote_headers import ADAPTER, open_far
from .session import Session

Notice = Callable[[str], None]
Opener = Callable[[str, str | None], Checkpoint]
QUANTISED_NAME = re.compile(r"(?i)[-_.](unsloth-)?(bnb|gptq|awq|gguf|[48]-?bits?|int[48]|fp8|nf4)\b.*$")


def gather(
    base: str | None,
    adapters: Sequence[str],
    out: str,
    session: Session,
    notice: Notice,
    accepted: Collection[str] = (),
    verb: str = "merge",
    *,
    opened_by: Opener | None = None,
) -> tuple[Checkpoint, list[Adapter]]:
    """Open the adapters, then the base: the one named, or the one that the first adapter names.

    `opened_by` opens a base by REF and revision; by default its headers, where it is on the Hub.

    `out` and `verb` are what the command line has, for the command that a hint names.

    Raises RefError and its siblings for what is not there, UsageError when BASE and ADAPTER are exchanged.
    """
    if base is not None:
        refuse_swapped(base, adapters, out, verb)
    opened = [open_adapter(fetch(ref, "ADAPTER", wanted_of_adapter, session), accepted) for ref in adapters]
    open_base = opened_by or partial(_open_headers, session)
    if base is not None:
        return open_base(base, None), opened
    found = _base_of(opened[0], adapters[0], out, verb, open_base)
    notice(f"base: {found.source.title}, as {opened[0].source.name} says")
    return found, opened


def _open_headers(session: Session, ref: str, revision: str | None) -> Checkpoint:
    return open_far(ref, "BASE", session, revision=revision)


def refuse_swapped(base: str, adapters: Sequence[str], out: str, verb: str, what: str = "BASE") -> None:
    """BASE is an adapter and an ADAPTER is a model: say so, with the command that was meant."""
    first = local_path(base, what)
    for adapter in adapters:
        second = local_path(adapter, "ADAPTER")
        if _only_adapter(first) and not _is_adapter(second) and _has_weights(second):
            exchanged = [base if ref == adapter else ref for ref in adapters]
            raise UsageError(
                f"{what} and ADAPTER are swapped: {base} is an adapter, {adapter} is a model.",
                hint=shlex.join(["dora-convert", verb, adapter, *exchanged, out]),
            )


def _only_adapter(path: Path) -> bool:
    return _is_adapter(path) and not _has_weights(path)


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def _has_weights(path: Path) -> bool:
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    return any(is_weight_file(name) and not OF_TRAINING.match(name) for name in names)


def _base_of(adapter: Adapter, ref: str, out: str, verb: str, open_base: Opener) -> Checkpoint:
    """The base an adapter was trained on, at the revision it names."""
    again = f"name it: dora-convert {verb} BASE {shlex.quote(ref)} {shlex.quote(out)}"
    if not adapter.base:
        raise RefError(
            f"The adapter {adapter.source.name} does not say which base it was trained on.", hint=again
        )
    if match := QUANTISED_NAME.search(adapter.base):
        raise UsageError(
            f"The adapter {adapter.source.name} was trained on {adapter.base}, a quantised copy. "
            "Name the full-precision model it was made from.",
            hint=f"perhaps {adapter.base[: match.start()]}: {again}",
        )
    name = (
        adapter.base
        if "/" in adapter.base or local_path(adapter.base, "the base").exists()
        else f"hf://{adapter.base}"
    )
    try:
        parse_ref(name, "BASE")
    except RefError as error:
        raise RefError(f"The adapter's base, {adapter.base!r}, is not here.", hint=again) from error
    return open_base(name, adapter.revision)


def doubts(base: Checkpoint, adapters: Sequence[Adapter]) -> Iterator[str]:
    """Warnings that need no tensor: another base than the adapter names, and files that are not used."""
    for adapter in adapters:
        if adapter.base and not _same_model(adapter.base, base):
            yield (
                f"{adapter.source.name} was trained on {adapter.base}; "
                f"BASE is {base.source.repo or base.source.name}"
            )
    yield from base.notes
    if base.left_behind:
        shown = ", ".join(base.left_behind[:5]) + (" …" if len(base.left_behind) > 5 else "")
        yield f"not copied, stale beside merged weights: {shown}"


def _same_model(name: str, base: Checkpoint) -> bool:
    """Whether the name an adapter has for its base can mean this one."""
    if base.source.repo:
        return name.lower() == base.source.repo.lower()
    try:
        parsed = parse_ref(name)
    except RefError:
        parsed = HubRef(name)
    if isinstance(parsed, Path):
        return parsed.resolve() == base.source.path.resolve()
    known = {base.source.name, str((base.config or {}).get("_name_or_path", ""))}
    last = name.rstrip("/").rpartition("/")[2].lower()
    return any(last == other.rstrip("/").rpartition("/")[2].lower() for other in known)


def open_adapter(source: Source, accepted: Collection[str] = ()) -> Adapter:
    """Recognise the format of an adapter folder and read its headers; `accepted` config fields are not refused.

    Raises RefError where no format recognises the folder, and what the format raises.
    """
    for known in FORMATS:
        if known.recognises(source.path):
            return known.read(source, accepted)
    raise _not_an_adapter(source)


def _not_an_adapter(source: Source) -> RefError:
    """Say what the folder is instead, and where the adapter might be."""
    root = source.path
    if root.is_file():
        return RefError(
            f"ADAPTER {source.name} is a file; name the folder it lies in.", hint=str(root.parent)
        )
    below = sorted(path.parent for path in root.glob("*/adapter_config.json"))
    below += sorted(path.parent for path in root.glob("*/*/adapter_config.json"))
    if below:
        names = ", ".join(path.relative_to(root).as_posix() for path in below[:10])
        return RefError(
            f"ADAPTER {source.name} has no adapter_config.json, but these folders inside it do: {names}.",
            hint=f"name one of them, such as {below[-1]}",
        )
    if (root / "config.json").exists():
        return RefError(f"ADAPTER {source.name} is a model, not an adapter: it has no adapter_config.json.")
    return RefError(f"ADAPTER {source.name} has no adapter_config.json.")


def open_or_refuse(source: Source, accepted: Collection[str]) -> tuple[Adapter, UnsupportedError | None]:
    """Return an adapter, and why it is refused: of a kind that is refused, as much as can be said."""
    try:
        return open_adapter(source, accepted), None
    except UnsupportedError as error:
        refusal = error
    raw = read_json(source.path / ADAPTER)
    try:
        return open_adapter(source, tuple(raw)), refusal
    except UnsupportedError:
        return _unread(source, raw), refusal


def _unread(source: Source, raw: Mapping[str, Any]) -> Adapter:
    """An adapter whose tensors mean something that is not known here."""
    files = sorted(source.path.glob("adapter_model.*"), reverse=True)  # safetensors before bin
    if not files:
        raise MalformedError(f"The adapter {source.name} has {ADAPTER} but no adapter_model.safetensors.")
    base, method = raw.get("base_model_name_or_path"), raw.get("peft_type")
    return Adapter(
        source=source,
        format="peft",
        kind=str(method or "unknown"),
        changes=(),
        tensors=read_weights(files[0]).tensors,
        files=(source.path / ADAPTER, files[0]),
        base=base if isinstance(base, str) else None,
    )
