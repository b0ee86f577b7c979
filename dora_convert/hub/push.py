"""Push a folder: check it against its receipt, upload the large files, then commit everything at once."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import xxhash
from filelock import FileLock, Timeout

from ..errors import HubError
from ..formats.detect import find_format
from ..output import card
from ..output.usage import library_of
from ..reports.push import Pushed, PushedFile, PushReport
from ..settings import Settings, __version__
from ..sources.hub_client import with_retries, without_bars
from ..storage.json_files import read_config
from ..storage.refs import parse_ref
from .commit import commit_folder
from .folder_contents import FolderContents, check_receipt, edited_files, read_folder
from .local_paths import Outgoing, base_of
from .target import PushTarget
from .upload import Upload


def push_folder(
    folder: str,
    target: PushTarget,
    *,
    base_model: str | None = None,
    dry_run: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> PushReport:
    """Push a folder, or with `dry_run` only check it and report; raises the errors that `verbs.push` names."""
    started, notify = time.monotonic(), on_notice or (lambda _: None)
    contents = read_folder(folder)
    if left := contents.left_behind:
        notify(f"not uploaded, no part of the model: {', '.join(left[:5])}{' …' if len(left) > 5 else ''}")
    if checked := check_receipt(contents):
        unknown = len(contents.tensors) - checked
        others = f"; it has no hash of {unknown} others" if unknown else ""
        notify(f"{checked} tensors match the receipt{others}")
    if names := edited_files(contents):
        notify(f"edited since the merge, so that unmerge refuses what is uploaded: {', '.join(names)}")
    outgoing = _outgoing(contents, base_model, notify)
    if dry_run:
        edited = {card.NAME: _new_card(contents, target, base_model), **outgoing.files}
        sizes = {**contents.sizes, **{name: len(data) for name, data in edited.items()}}
        files = tuple(PushedFile(name, size, "planned") for name, size in sorted(sizes.items()))
        total = sum(sizes.values())
        pushed = Pushed(repo=target.repo, url="", commit="", files=files, deleted=(), bytes_uploaded=total)
    else:
        pushed = _upload(contents, outgoing.files, Upload(target, notify), base_model, on_progress or (lambda *_: None))
    return PushReport(
        **vars(pushed),
        kind="adapter" if contents.adapter else "checkpoint",
        left_behind=left,
        dry_run=dry_run,
        seconds=round(time.monotonic() - started, 3),
    )


def _outgoing(contents: FolderContents, base_model: str | None, notify: Callable[[str], None]) -> Outgoing:
    """Return the files that are uploaded with other bytes; refuse paths of this machine that nothing replaces."""
    folder, receipt = contents.source.path, contents.receipt
    readme = (folder / card.NAME).read_bytes() if card.NAME in contents.sizes else b""
    base = base_model or (receipt.base.repo if receipt else None) or base_of(readme)
    outgoing = Outgoing(folder, base, given=base_model is not None, notify=notify)
    outgoing.add_configs(contents.sizes)
    if card.NAME in contents.sizes:
        outgoing.add_card(readme, "adapter" if contents.adapter else "finetune")
    outgoing.refuse_paths()
    return outgoing


def _upload(
    contents: FolderContents,
    edited: Mapping[str, bytes],
    upload: Upload,
    base_model: str | None,
    on_progress: Callable[[int, int], None],
) -> Pushed:
    upload.open()
    if receipt := contents.receipt:
        upload.copy_from(receipt.base.repo, receipt.base.commit)
    folder, done, total = contents.source.path, 0, sum(contents.sizes.values())

    def add(size: int) -> None:
        nonlocal done
        done += size
        on_progress(done, total)

    message = f"Upload {contents.source.name} with dora-convert {__version__}"
    with contextlib.closing(upload), without_bars(), _push_journal(upload, folder):
        readme = edited.get(card.NAME) or _new_card(contents, upload.target, base_model)
        return commit_folder(upload, folder, list(contents.sizes), readme, message, edited=edited, on_sent=add)


def _new_card(contents: FolderContents, target: PushTarget, base_model: str | None) -> bytes:
    """Return a card for a folder that has none."""
    source, receipt, adapter = contents.source, contents.receipt, contents.adapter
    config = read_config(source.path)
    kinds: tuple[str, ...] = ()
    about, base, library = f"{source.name}, a checkpoint.", None, library_of(config)
    sources: list[tuple[str, str, str]] = []
    if receipt:
        kinds, base = tuple(merged.kind for merged in receipt.adapters), receipt.base.repo
        about = f"{' and '.join(kinds)} folded into the weights of {receipt.base.title}."
        inputs = [("base", receipt.base), *(("adapter", merged) for merged in receipt.adapters)]
        sources = [(role, merged.title, merged.commit or "") for role, merged in inputs]
    if adapter:
        kinds, library = (adapter.kind,), find_format(adapter.format).LIBRARY
        parameters = sum(tensor.numel for tensor in adapter.tensors.values())
        about = f"{adapter.kind}, {len(adapter.changes)} modules, {parameters:,} parameters."
        base = adapter.base if not base_model and _is_on_hub(adapter.base, target.token) else None
    facts = card.Facts(
        title=source.name,
        about=about,
        kinds=kinds,
        relation="adapter" if adapter else "finetune",
        base_model=base_model or base,
        library=library,
        pipeline=card.pipeline_of(config, {}),
        config=config,
        task=adapter.task if adapter else None,
        sources=tuple(sources),
        record=bool(receipt),
    )
    return card.render(facts)


@contextlib.contextmanager
def _push_journal(upload: Upload, folder: Path) -> Iterator[None]:
    """Keep the journal of this push in the user's cache, if the cache can be written to."""
    from huggingface_hub import constants

    key = xxhash.xxh3_64_hexdigest(f"{constants.ENDPOINT} {upload.repo} {folder.resolve()}".encode())
    path = Path(constants.HF_HOME) / "dora_convert" / "pushes" / f"{key}.jsonl"
    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        upload.keep_journal(path)
    except Timeout as error:
        raise HubError(f"Another push of {folder} to {upload.repo} is running.", hint="wait for it to end") from error
    except OSError:  # a read-only cache: the server still knows its files
        lock.release()
    try:
        yield
    finally:
        lock.release()


def _is_on_hub(name: str | None, token: str | None) -> bool:
    """Return True if a base's name, which may be a path on another machine, is a repo on the Hub."""
    from huggingface_hub import HfApi

    if not name or Path(name).expanduser().is_absolute() or name.startswith("."):
        return False
    try:
        return not isinstance(parse_ref(name), Path) and with_retries(lambda: HfApi(token=token).repo_exists(name))
    except Exception:  # noqa: BLE001 - the card then names no base
        return False


def push_output(out: str, target: PushTarget | None, settings: Settings) -> PushReport | None:
    """Push the published output of a verb, if a target is given.

    Raises HubError with the `push` command as its hint: OUT is complete whatever the Hub answers.
    """
    if target is None:
        return None
    try:
        return push_folder(out, target, base_model=settings.base_model, on_notice=settings.on_notice)
    except HubError as error:
        error.hint = f"{out} is complete; to resume: dora-convert push {shlex.quote(out)} {target.repo}"
        raise
