"""Upload files into one commit of a Hub repo: large files one by one, the commit last.

The repo shows nothing before the commit, so never half a model. An upload that was cut off does not start
over: files of the repo with the same hash are skipped, and a journal holds the name, size and sha256 of each
file that the server has, even if its local copy is deleted. For all other files the server skips (LFS) or
deduplicates (Xet) known bytes. Files of the base's repo are copied on the server if it allows that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HubError
from ..reports.push import Pushed, PushedFile
from ..sources.hub_client import status_of, with_retries, writing_errors
from ..storage.journal import JournalKey
from ..storage.reader import hash_of
from .server_copy import CopySource
from .target import PushTarget
from .upload_journal import UploadedFile, UploadJournal

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

LARGE = 1_000_000
"""Size in bytes from which a file is uploaded by itself, before the commit."""


class Upload:
    """The files that one run uploads, until they are committed together."""

    def __init__(self, target: PushTarget, notify: Callable[[str], None]) -> None:
        self.target, self.notify = target, notify
        self.repo = target.repo
        self.repo_files: Mapping[str, Any] = {}
        """The repo's files by path, as huggingface_hub lists them."""
        self.refused_copies: Collection[str] = ()
        """Files that must not be copied on the server, although the journal does not say so any more."""
        self._api: HfApi
        self._head: str
        self._operations: dict[str, CommitOperationAdd] = {}
        self._files: dict[str, PushedFile] = {}
        self._journal = UploadJournal()
        self._bytes = 0
        self._copies: CopySource | None = None

    def open(self) -> None:
        """Find or create the repo, and list its files.

        Raises HubError if the repo cannot be written to, as far as that is known before the first upload.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        self._api = api = HfApi(token=self.target.token)
        with writing_errors(self.repo):
            if "/" not in self.repo:
                self.repo = f"{with_retries(api.whoami)['name']}/{self.repo}"
            try:
                info = with_retries(lambda: api.model_info(self.repo))
            except RepositoryNotFoundError:
                info = self._create()
            if self.target.private and info.private is False:
                raise HubError(
                    f"{self.repo} exists and is public; --private does not change that.",
                    hint="make it private in its settings first, or choose another name",
                )
            self._head = str(info.sha)
            tree = with_retries(lambda: list(api.list_repo_tree(self.repo, recursive=True, revision=self._head)))
        self.repo_files = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}

    def _create(self) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        private = True if self.target.private else None
        with_retries(lambda: self._api.create_repo(self.repo, private=private, exist_ok=True))
        try:
            return with_retries(lambda: self._api.model_info(self.repo))
        except RepositoryNotFoundError as error:
            raise HubError(
                f"{self.repo} exists, but not as a model that you may see.", hint="choose another name"
            ) from error

    @property
    def key(self) -> JournalKey:
        """The key of this upload's journal."""
        return {"endpoint": self._api.endpoint, "repo": self.repo}

    def keep_journal(self, path: Path, *, by_name: bool = False) -> None:
        """Keep a journal at `path`, and resume from a journal of the same repo at that path."""
        self._journal = UploadJournal(path, self.key, by_name=by_name)
        self._journal.refuse(self.refused_copies)

    def copy_from(self, repo: str | None, commit: str | None) -> None:
        """Name a repo of this Hub, at a commit, that may hold some of the large files already."""
        if repo and commit and repo != self.repo:
            self._copies = CopySource(self._api, repo, commit, self.notify)

    def has(self, name: str) -> bool:
        """Return True if a file was uploaded, copied or skipped in this run."""
        return name in self._files

    def send(self, name: str, path: Path) -> None:
        """Upload a file now unless the server has it; the local file may be removed afterwards.

        If the local file does not exist, the file that the journal has under this name is taken.
        """
        if self.has(name):
            return
        if known := self._journal.known(name, path):
            self._resume(name, known)
            return
        size = path.stat().st_size
        if self._is_unchanged(name, path):
            self._files[name] = PushedFile(name, size, "unchanged")
        elif self._copies and self._journal.may_copy(name) and (sha256 := self._copies.copy(path, self.repo)):
            self.notify(f"copied on the Hub: {name}")
            self._operations[name] = self._enter(name, path, sha256)
            self._files[name] = PushedFile(name, size, "copied")
        else:
            self._upload(name, path)
            self._files[name] = PushedFile(name, size, "uploaded")
            self._bytes += size

    def _resume(self, name: str, known: UploadedFile) -> None:
        """Take a file that the journal has; the repo has it too if the run was killed after its commit."""
        lfs = getattr(self.repo_files.get(name), "lfs", None)
        committed = lfs is not None and lfs.sha256 == known.sha256
        self._files[name] = PushedFile(name, known.bytes, "unchanged" if committed else "uploaded")
        if not committed:
            self._operations[name] = _operation_of(known)

    def _upload(self, name: str, path: Path) -> None:
        from huggingface_hub import CommitOperationAdd

        self.notify(f"uploading {name}")
        with writing_errors(self.repo):
            operation = upload_ahead(self._api, self.repo, name, path, create_pr=self.target.create_pr)
        if is_uploaded(operation):
            self._enter(name, path, operation.upload_info.sha256.hex())
        else:  # a small file that goes with the commit itself
            operation = CommitOperationAdd(name, path.read_bytes())
        self._operations[name] = operation

    def arrived(self, name: str, size: int, sha256: str) -> None:
        """Enter a file that another machine has uploaded."""
        file = UploadedFile(name, size, 0, sha256)
        self._journal.enter(file)
        self._resume(name, file)
        self._bytes += size if self._files[name].state == "uploaded" else 0

    def _enter(self, name: str, path: Path, sha256: str) -> CommitOperationAdd:
        """Enter a file that the server has into the journal, and return the operation that commits it."""
        stat = path.stat()
        file = UploadedFile(name, stat.st_size, stat.st_mtime_ns, sha256)
        self._journal.enter(file)
        return _operation_of(file)

    def read(self, name: str) -> bytes | None:
        """Return a small file of the repo as `open` found it; None if the repo does not have it."""
        if name not in self.repo_files:
            return None
        with writing_errors(self.repo):
            path = with_retries(
                lambda: self._api.hf_hub_download(self.repo, name, revision=self._head, token=self.target.token)
            )
        return Path(path).read_bytes()

    def _is_unchanged(self, name: str, source: Path | bytes) -> bool:
        """Return True if the repo has a file with this name and these bytes."""
        file = self.repo_files.get(name)
        size = _size(source)
        if file is None or file.size != size:
            return False
        if file.lfs:
            return bool(hash_of(hashlib.sha256(), source) == file.lfs.sha256)
        return bool(hash_of(hashlib.sha1(b"blob %d\0" % size), source) == file.blob_id)  # noqa: S324 - git's

    def commit(self, small: Mapping[str, Path | bytes], stale: Sequence[str], message: str) -> Pushed:
        """Commit all uploaded files together with `small` ones, delete `stale` ones, and end the journal.

        If nothing is new, no commit is made.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        for name, source in small.items():
            unchanged = self._is_unchanged(name, source)
            self._files[name] = PushedFile(name, _size(source), "unchanged" if unchanged else "uploaded")
            if not unchanged:
                self._operations[name] = CommitOperationAdd(name, source)
                self._bytes += _size(source)
        operations = [
            *(self._operations[name] for name in sorted(self._operations)),
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
        ]
        url, head = f"{self._api.endpoint}/{self.repo}", self._head
        if operations:
            url, head = self._create_commit(operations, self.target.message or message)
        self._journal.remove()
        return Pushed(
            repo=self.repo,
            url=url,
            commit=head,
            files=tuple(self._files[name] for name in sorted(self._files)),
            deleted=tuple(stale),
            bytes_uploaded=self._bytes,
        )

    def _create_commit(self, operations: Sequence[Any], message: str) -> tuple[str, str]:
        """Commit on top of the head that `open` found, or in a pull request; return its URL and hash."""

        def create() -> Any:
            return self._api.create_commit(
                self.repo, operations, commit_message=message, create_pr=self.target.create_pr, parent_commit=self._head
            )

        with writing_errors(self.repo):
            try:
                commit = with_retries(create)
            except Exception as error:
                if status_of(error) in (400, 404, 422):  # the server may have lost files that the journal has
                    copied = [name for name, file in self._files.items() if file.state == "copied"]
                    self._journal.remove(refused=copied)
                raise
        return commit.pr_url or f"{self._api.endpoint}/{self.repo}", commit.oid

    def close(self) -> None:
        """Close the journal and keep it for the next run."""
        self._journal.close()


def upload_ahead(api: HfApi, repo: str, name: str, path: Path, *, create_pr: bool) -> CommitOperationAdd:
    """Upload a file ahead of the commit, unless it must go with the commit; return the operation that commits it."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, path)
    with_retries(lambda: api.preupload_lfs_files(repo, [operation], create_pr=create_pr))
    return operation


def is_uploaded(operation: CommitOperationAdd) -> bool:
    """Return True if the server has the file: preupload_lfs_files empties what it has uploaded."""
    return bool(operation.path_or_fileobj == b"")


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _operation_of(file: UploadedFile) -> CommitOperationAdd:
    """Return the operation of an uploaded file from its line in the journal, as after `preupload_lfs_files`.

    The local file may be deleted, and huggingface_hub has no public way to commit a file by its hash alone.
    The only place that sets private fields of huggingface_hub.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(file.name, b"")
    operation.upload_info = UploadInfo(size=file.bytes, sample=b"", sha256=bytes.fromhex(file.sha256))
    operation._upload_mode, operation._should_ignore = "lfs", False  # noqa: SLF001
    operation._is_uploaded = True  # noqa: SLF001
    return operation
