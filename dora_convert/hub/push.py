"""Push a folder: check it against its receipt, upload the large files, then commit everything at once."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash
from filelock import FileLock, Timeout

from .. import __version__
from ..errors import HubError
from ..formats.detect import find_format
from ..output import card
from ..output.receipt import Receipt
from ..reports.push import Pushed, PushedFile, PushReport
from ..settings import Settings
from ..sources.hub_client import with_retries
from ..storage.json_files import read_config
from ..storage.refs import parse_ref
from .commit import commit, is_large
from .folder_contents import FolderContents, check_receipt, read_folder
from .target import PushTarget
from .upload import Upload


class FolderPush:
    """One push of one folder."""

    def __init__(
        self,
        folder: str,
        target: PushTarget,
        *,
        base_model: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        self._folder, self._target, self._base_model = folder, target, base_model
        self._on_progress, self._notify = on_progress, on_notice or (lambda _: None)
        self._started = time.monotonic()

    def run(self, *, dry_run: bool) -> PushReport:
        """Push the folder, or only check it and report; raises the errors that `verbs.push` names."""
        contents = read_folder(self._folder)
        if contents.left_behind:
            shown = ", ".join(contents.left_behind[:5]) + (" …" if len(contents.left_behind) > 5 else "")
            self._notify(f"not uploaded, no part of the model: {shown}")
        if checked := check_receipt(contents):
            self._notify(f"{checked} tensors match the receipt")
        if dry_run:
            return self._report(contents, self._planned(contents), dry_run=True)
        upload = Upload(self._target, self._notify)
        upload.open()
        if receipt := contents.receipt:
            upload.copy_from(receipt.base.repo, receipt.base.commit)
        folder = contents.source.path
        message = f"Upload {contents.source.name} with dora-convert {__version__}"
        with contextlib.closing(upload), _push_journal(upload, folder):
            self._send_large(contents, upload)
            pushed = commit(upload, folder, contents.names, self._card(contents), message)
        return self._report(contents, pushed)

    def _send_large(self, contents: FolderContents, upload: Upload) -> None:
        sizes = {name: contents.path(name).stat().st_size for name in contents.names}
        done, total = 0, sum(sizes.values())
        for name, size in sizes.items():
            if is_large(name, size):
                upload.send(name, contents.path(name))
                done += size
                if self._on_progress:
                    self._on_progress(done, total)

    def _planned(self, contents: FolderContents) -> Pushed:
        sizes = {name: contents.path(name).stat().st_size for name in contents.names}
        if card.NAME not in sizes:
            sizes[card.NAME] = len(self._card(contents))
        files = tuple(PushedFile(name, size, "planned") for name, size in sizes.items())
        total = sum(sizes.values())
        return Pushed(repo=self._target.repo, url="", commit="", files=files, deleted=(), bytes_uploaded=total)

    def _card(self, contents: FolderContents) -> bytes:
        """Return the folder's README, or a new card if there is none."""
        if card.NAME in contents.names:
            return contents.path(card.NAME).read_bytes()
        return card.render(self._facts(contents))

    def _facts(self, contents: FolderContents) -> card.Facts:
        receipt = contents.receipt
        name, adapter = contents.source.name, contents.adapter
        config = read_config(contents.source.path)
        kinds = tuple(merged.kind for merged in receipt.adapters) if receipt else ()
        sources = tuple(_sources(receipt)) if receipt else ()
        about = f"{name}, a checkpoint."
        if adapter:
            parameters = sum(tensor.numel for tensor in adapter.tensors.values())
            kinds = (adapter.kind,)
            about = f"{adapter.kind}, {len(adapter.changes)} modules, {parameters:,} parameters."
        elif sources:
            about = f"{' and '.join(kinds)} folded into the weights of {sources[0][1]}."
        return card.Facts(
            title=name,
            about=about,
            kinds=kinds,
            relation="adapter" if adapter else "finetune",
            base_model=self._base(contents),
            library=find_format(adapter.format).LIBRARY if adapter else card.library_of(config),
            pipeline=card.pipeline_of(config, {}),
            config=config,
            sources=sources,
            record=bool(receipt),
        )

    def _base(self, contents: FolderContents) -> str | None:
        """Return the base's repo id from the caller, the receipt, or the adapter's config if it is a repo."""
        if self._base_model:
            return self._base_model
        if contents.adapter is None:
            return contents.receipt.base.repo if contents.receipt else None
        name = contents.adapter.base
        return name if name and _is_on_hub(name, self._target.token) else None

    def _report(self, contents: FolderContents, pushed: Pushed, *, dry_run: bool = False) -> PushReport:
        return PushReport(
            **vars(pushed),
            kind="adapter" if contents.adapter else "checkpoint",
            left_behind=contents.left_behind,
            dry_run=dry_run,
            seconds=round(time.monotonic() - self._started, 3),
        )


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


def _sources(receipt: Receipt) -> Iterator[tuple[str, str, str]]:
    """Yield the role, title and commit of the base and of each adapter."""
    yield "base", receipt.base.title, receipt.base.commit or ""
    for adapter in receipt.adapters:
        yield "adapter", adapter.title, adapter.commit or ""


def _is_on_hub(name: str, token: str | None) -> bool:
    """Return True if a base's name, which may be a path on another machine, is a repo on the Hub."""
    from huggingface_hub import HfApi

    if Path(name).expanduser().is_absolute() or name.startswith("."):
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
    push = FolderPush(out, target, base_model=settings.base_model, on_notice=settings.on_notice)
    try:
        return push.run(dry_run=False)
    except HubError as error:
        error.hint = f"{out} is complete; to resume: dora-convert push {shlex.quote(out)} {target.repo}"
        raise
