"""Open the inputs that a command line names: checkpoints and adapters, local or on the Hub, by their headers.

Code for the Hub is imported only if a REF is a Hub repo.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..adapters import NOTHING, Adapter, Waived
from ..errors import DoraConvertError, RefError, UnsupportedError, UsageError, noted, together
from ..formats.detect import (
    detect,
    find_format,
    is_adapter_file,
    is_only_adapter,
    model_weights,
    read_refused,
    refuse_adapter,
    refuse_tensors,
)
from ..storage.checkpoint import Checkpoint, open_checkpoint
from ..storage.filenames import GGUF, file_states, is_tokenizer_file, list_files, refuse_links
from ..storage.refs import (
    QUANTISED_NAME,
    HubRef,
    Source,
    is_stored,
    local_path,
    local_source,
    parse_ref,
    refuse_missing,
)
from ..storage.safetensors import files_of
from . import Session

Mode = Literal["brief", "headers", "ranges", "whole", "local"]
COMBINING = frozenset({"merge", "to-lora", "verify"})
"""Verbs that follow a chain of adapters down to its model."""


def open_inputs(
    base: str | None,
    adapters: Sequence[str],
    session: Session,
    *,
    out: str,
    verb: str = "merge",
    waived: Waived = NOTHING,
    mode: Mode = "headers",
    weights: Path | None = None,
    method: str | None = None,
) -> tuple[Checkpoint, list[Adapter]]:
    """Open the adapters, then the base: the named one, or the one that the first adapter names.

    A lone adapter whose base is another adapter becomes a chain, which begins with that one. With a `method` of
    combination, an adapter may be a fine-tuned checkpoint. `out` and `verb` are words of the command line, for
    hints; `open_base` and `open_adapter` explain the rest.

    Raises RefError and its siblings for missing inputs, UsageError if BASE and ADAPTER are swapped.
    """
    if base is not None:
        refuse_swapped(base, adapters, out, verb)
    tuned = bool(method) and method != "chain"
    opened = _open_adapters(adapters, base, lambda ref: open_adapter(ref, session, waived, tuned=tuned), session)
    refuse_needless(opened, waived)
    for name in waived.files:
        if not any((adapter.source.path / name).is_file() for adapter in opened):
            raise UsageError(f"--ignore-file {name}: no adapter has a file of that name.")
    ref, revision = (base, None) if base is not None else _base_of(opened[0], adapters[0], out, verb)
    while base is None and verb in COMBINING and len(adapters) == 1:
        if not (below := _adapter_below(ref, revision, opened, session)):
            break
        opened.insert(0, read_adapter(below, waived))
        ref, revision = _base_of(opened[0], below.address, out, verb)
    checkpoint = open_base(ref, "BASE", session, mode, revision=revision, weights=weights)
    if base is None:
        session.notify(f"base: {checkpoint.source.title}, as {opened[0].source.name} says")
    return checkpoint, opened


def _open_adapters(
    refs: Sequence[str], base: str | None, open_one: Callable[[str], Adapter], session: Session
) -> list[Adapter]:
    """Open all adapters. If one cannot be opened, the error names all of them, and a BASE that cannot be either."""
    opened, errors = list[Adapter](), list[tuple[str, DoraConvertError]]()
    with noted(errors, f"BASE {base!r}"):
        refuse_missing(("BASE", base))
    for ref in refs:
        with noted(errors, f"ADAPTER {ref!r}"):
            opened.append(open_one(ref))
    if errors and base is not None and not errors[0][0].startswith("BASE"):
        with noted(errors, f"BASE {base!r}"):
            open_base(base, "BASE", session, "brief")
    if errors:
        raise together(sorted(errors, key=lambda error: not error[0].startswith("BASE")))
    return opened


def open_base(
    ref: str,
    what: str,
    session: Session,
    mode: Mode = "headers",
    *,
    revision: str | None = None,
    weights: Path | None = None,
) -> Checkpoint:
    """Open a checkpoint; `what` is its word on the command line.

    The weights of a Hub repo stay on the Hub in mode "headers"; in mode "brief", so do the side files.
    `weights` is the folder for a later download, by default the session's. Mode "whole" downloads the repo.
    Mode "local" takes a local path only, which an earlier run may have begun to change in place. Weights in an
    object store stay there in modes "ranges" and "brief", and are downloaded in the others.
    """
    if is_stored(ref) and mode != "local":
        from .object_store import fetch_folder, open_stored

        if mode in ("brief", "ranges"):
            return open_stored(ref, what, session)
        return open_checkpoint(fetch_folder(ref, session))
    parsed = local_path(ref, what) if mode == "local" else parse_ref(ref, what)
    if isinstance(parsed, HubRef):
        from .download import fetch_base
        from .remote_headers import look

        parsed = replace(parsed, revision=parsed.revision or revision)
        if mode != "whole" and not parsed.file.endswith(GGUF):
            with suppress(UnsupportedError):  # torch's pickles have no headers that are read from the Hub
                remote = look(parsed, what, session, whole=mode != "brief", weights=weights).checkpoint()
                if remote.config is None:
                    refuse_tensors(remote.tensors, f"{what} {remote.source.name}")
                if not any(".quant_state." in name for name in remote.tensors):
                    return remote  # else only the bytes of these tensors tell the shapes of the weights
        source = fetch_base(parsed, what, session)
    else:
        source = local_source(parsed)
    refuse_adapter(source.path, f"{what} {source.name}")
    checkpoint = open_checkpoint(source, unfinished=mode == "local")
    _refuse_links(checkpoint.root, checkpoint, session)
    return checkpoint


def _adapter_below(ref: str, revision: str | None, links: Sequence[Adapter], session: Session) -> Source | None:
    """Return the adapter that the first link of a chain was trained on; None for a model."""
    if (path := Path(ref)).is_dir() and not detect(path):
        return None
    from .combined import adapter_below

    return adapter_below(ref, revision, links, session)


def open_adapter(ref: str, session: Session, waived: Waived = NOTHING, *, tuned: bool = False) -> Adapter:
    """Open an adapter; what is waived is left out. With `tuned`, a checkpoint is opened as one, too."""
    if tuned:
        from .combined import find_tuned, read_tuned

        if source := find_tuned(ref, session):
            return read_tuned(source)
    adapter = read_adapter(find_adapter(ref, session), waived)
    path = adapter.source.path
    _refuse_links(path if path.is_dir() else path.parent, adapter, session)
    return adapter


def refuse_needless(adapters: Sequence[Adapter], waived: Waived) -> None:
    """Raise UsageError for a fact that no adapter lacks."""
    for name in waived.facts.given:
        if not any(name in find_format(adapter.format).TAKES for adapter in adapters):
            formats = ", ".join(sorted({adapter.format for adapter in adapters}))
            raise UsageError(f"--{name.replace('_', '-')} is for files that lack it; those of {formats} do not.")


def _refuse_links(root: Path, opened: Checkpoint | Adapter, session: Session) -> None:
    """Refuse links out of the folder if the run copies side files; weights may lie elsewhere."""
    if session.follow_links is not None:
        weights = files_of(opened.tensors.values())
        refuse_links(root, opened.states.keys() - weights, follow=session.follow_links)


def find_adapter(ref: str, session: Session) -> Source:
    """Return an adapter's local folder; the files of a Hub repo are downloaded."""
    if is_stored(ref):
        from .object_store import fetch_folder

        return fetch_folder(ref, session)
    parsed = parse_ref(ref, "ADAPTER")
    if isinstance(parsed, Path):
        return local_source(parsed)
    from .download import fetch_adapter

    return fetch_adapter(parsed, session)


def read_adapter(source: Source, waived: Waived = NOTHING) -> Adapter:
    """Recognise the format of an adapter, a folder or a file, and read its headers.

    Raises RefError if no format recognises it, and the errors of the format.
    """
    if not (known := detect(source.path)):
        from .not_an_adapter import error_for

        raise error_for(source)
    adapter = known.read(source, waived)
    root = adapter.source.path
    own = [root / name for name in list_files(root) if is_adapter_file(name) or is_tokenizer_file(name)]
    return replace(adapter, states=file_states([*own, *adapter.files]))


def read_or_refuse(source: Source, waived: Waived) -> tuple[Adapter, UnsupportedError | None]:
    """Return an adapter and the reason if it is refused; of a refused one, as much as can be said."""
    known = detect(source.path)
    try:
        return read_adapter(source, waived), None
    except UnsupportedError as error:
        assert known
        return read_refused(known, source, waived), error


def refuse_swapped(base: str, adapters: Sequence[str], out: str, verb: str, what: str = "BASE") -> None:
    """Raise UsageError, with the intended command, if BASE is an adapter and an ADAPTER is a model."""
    if not is_only_adapter(local_path(base, what)):
        return
    for adapter in adapters:
        path = local_path(adapter, "ADAPTER")
        if path.is_dir() and not detect(path) and model_weights(path):
            swapped = [base if ref == adapter else ref for ref in adapters]
            raise UsageError(
                f"{what} and ADAPTER are swapped: {base} is an adapter, {adapter} is a model.",
                hint=shlex.join(["dora-convert", verb, adapter, *swapped, *([out] if out else [])]),
            )


def _base_of(adapter: Adapter, ref: str, out: str, verb: str) -> tuple[str, str | None]:
    """Return the REF of the base that an adapter was trained on, and the revision that the adapter names."""
    again = f"name it: dora-convert {verb} BASE {shlex.quote(ref)} {shlex.quote(out)}"
    if not adapter.base:
        raise RefError(f"The adapter {adapter.source.name} does not say which base it was trained on.", hint=again)
    if match := QUANTISED_NAME.search(adapter.base):
        raise UsageError(
            f"The adapter {adapter.source.name} was trained on {adapter.base}, a quantised copy. "
            "Name the full-precision model it was made from.",
            hint=f"perhaps {adapter.base[: match.start()]}: {again}",
        )
    is_ref = "/" in adapter.base or local_path(adapter.base, "the base").exists()
    name = adapter.base if is_ref else f"hf://{adapter.base}"
    try:
        parse_ref(name, "BASE")
    except RefError as error:
        raise RefError(f"The adapter's base, {adapter.base!r}, is not here.", hint=again) from error
    return name, adapter.revision


def modules_of(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield the names of the modules that adapters change."""
    yield from (module for adapter in adapters for module in adapter.modules)


def unused(base: Checkpoint, adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield warnings about files of a base, or beside adapters, that take no part."""
    for adapter in adapters:
        yield from adapter.warnings
        if adapter.beside:
            from ..adapters.beside import doubts_of

            yield from doubts_of(adapter.beside, adapter.source.name)
    yield from base.notes
    if base.left_behind:
        names = ", ".join(base.left_behind[:5]) + (" …" if len(base.left_behind) > 5 else "")
        yield f"not copied, stale beside merged weights: {names}"


def strangers(base: Checkpoint, adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the adapters that name another base than BASE."""
    return [adapter for adapter in adapters if adapter.base and not _same_model(adapter.base, base)]


def _same_model(name: str, base: Checkpoint) -> bool:
    """Return True if an adapter's name for its base can mean this base."""
    if base.source.repo:
        return name.lower() == base.source.repo.lower()
    try:
        parsed = parse_ref(name)
    except RefError:
        parsed = HubRef(name)
    if isinstance(parsed, Path):
        return parsed.resolve() == base.source.path.resolve()
    known = {base.source.name, str((base.config or {}).get("_name_or_path", ""))}
    return Path(name).name.lower() in {Path(other).name.lower() for other in known}
