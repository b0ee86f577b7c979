"""Push a folder: look at it, check it against its receipt, upload the large files, then commit all of it at once."""

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
from ..reports.merge import PushReport
from ..reports.push import Pushed, Sent, Target
from ..settings import Settings
from ..sources.hub_client import patiently
from ..storage.json_files import read_config
from ..storage.refs import parse_ref
from .commit import commit, is_large
from .folder_contents import FolderContents, check_receipt, pack
from .upload import Upload

Notice = Callable[[str], None]


class FolderPush:
    """One push of one folder."""

    def __init__(
        self,
        folder: str,
        target: Target,
        base_model: str | None,
        on_progress: Callable[[int, int], None] | None,
        on_notice: Notice | None,
    ) -> None:
        self._folder, self._target, self._base_model = folder, target, base_model
        self._on_progress, self._notify = on_progress, on_notice or (lambda _: None)
        self._started = time.monotonic()

    def run(self, *, dry_run: bool) -> PushReport:
        """Push, or only say what would be; what `verbs.push` says about errors holds."""
        contents = pack(self._folder)
        if contents.left_behind:
            shown = ", ".join(contents.left_behind[:5]) + (" …" if len(contents.left_behind) > 5 else "")
            self._notify(f"not uploaded, no part of the model: {shown}")
        if checked := check_receipt(contents):
            self._notify(f"{checked} tensors are what the receipt says")
        if dry_run:
            return self._report(contents, self._planned(contents), dry_run=True)
        upload = Upload(self._target, self._notify)
        upload.open()
        if receipt := contents.receipt:
            upload.offer(receipt.base.repo, receipt.base.commit)
        with contextlib.closing(upload), _remembering(upload, contents.source.path):
            self._send_large(contents, upload)
            made = commit(
                upload, contents.source.path, contents.names, self._card(contents), self._message(contents)
            )
        return self._report(contents, made)

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
        files = tuple(Sent(name, contents.path(name).stat().st_size, "planned") for name in contents.names)
        if card.NAME not in contents.names:
            files += (Sent(card.NAME, len(self._card(contents)), "planned"),)
        total = sum(file.bytes for file in files)
        return Pushed(
            repo=self._target.repo, url="", commit="", files=files, deleted=(), bytes_uploaded=total
        )

    def _card(self, contents: FolderContents) -> bytes:
        """The folder's README, else a card."""
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
            library=find_format(adapter.format).LIBRARY if adapter else "transformers" if config else None,
            pipeline=card.pipeline_of(config, {}),
            sources=sources,
            record=bool(receipt),
        )

    def _base(self, contents: FolderContents) -> str | None:
        """The base's repo id: as the caller says, or the receipt; what an adapter names counts if it is on the Hub."""
        if self._base_model:
            return self._base_model
        if contents.adapter is None:
            return contents.receipt.base.repo if contents.receipt else None
        named = contents.adapter.base
        return named if named and _is_on_hub(named, self._target.token) else None

    def _message(self, contents: FolderContents) -> str:
        return f"Upload {contents.source.name} with dora-convert {__version__}"

    def _report(self, contents: FolderContents, made: Pushed, *, dry_run: bool = False) -> PushReport:
        return PushReport(
            **vars(made),
            kind="adapter" if contents.adapter else "checkpoint",
            left_behind=contents.left_behind,
            dry_run=dry_run,
            seconds=round(time.monotonic() - self._started, 3),
        )


@contextlib.contextmanager
def _remembering(upload: Upload, folder: Path) -> Iterator[None]:
    """The journal of this folder's push to this repo, in the user's cache; without a cache there is none."""
    from huggingface_hub import constants

    key = xxhash.xxh3_64_hexdigest(f"{constants.ENDPOINT} {upload.repo} {folder.resolve()}".encode())
    path = Path(constants.HF_HOME) / "dora_convert" / "pushes" / f"{key}.jsonl"
    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        upload.remember(path)
    except Timeout as error:
        raise HubError(
            f"Another push of {folder} to {upload.repo} is running.", hint="wait for it to end"
        ) from error
    except OSError:  # a cache that is read-only: the server still knows what it has
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
    """Whether a base's name, which may be a path on its author's machine, is that of a repo."""
    from huggingface_hub import HfApi

    if Path(name).expanduser().is_absolute() or name.startswith("."):
        return False
    try:
        return not isinstance(parse_ref(name), Path) and patiently(
            lambda: HfApi(token=token).repo_exists(name)
        )
    except Exception:  # noqa: BLE001 - then nobody knows, and the card does without
        return False


def push_output(out: str, target: Target | None, settings: Settings) -> PushReport | None:
    """Push what a verb has just published under its final name, if it was asked to.

    Raises HubError with a hint at `push`: OUT is complete whatever the Hub says.
    """
    if target is None:
        return None
    try:
        return FolderPush(out, target, settings.base_model, None, settings.on_notice).run(dry_run=False)
    except HubError as error:
        error.hint = f"{out} is complete; dora-convert push {shlex.quote(out)} {target.repo} goes on"
        raise
