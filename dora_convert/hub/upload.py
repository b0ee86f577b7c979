"""A commit to a Hub repo in the making: large files go up one by one, the commit comes last.

Until then the repo shows nothing of it, so never half a model. What is up already is known three ways: files of the
repo with the same hash are left alone; the journal of an upload that did not finish tells what the server has by name,
size and sha256, even of files that are gone here; and of all else the server skips (LFS) or deduplicates (Xet) what it
knows. What the base's repo has is copied on the Hub, where that does it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HubError
from ..reports.push import Pushed, Sent, Target
from ..sources.hub_client import explained_writing, patiently, status_of, without_bars
from ..storage.journal import JournalKey
from ..storage.reader import hash_of
from .server_copy import ServerCopy
from .upload_journal import UploadedFile, UploadJournal

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

LARGE = 1_000_000
"""Bytes from which a file goes up by itself, before the commit."""


class Upload:
    """Files on their way into one commit of one repo."""

    def __init__(self, target: Target, notify: Callable[[str], None]) -> None:
        self.target, self._notify = target, notify
        self.repo = target.repo
        self.there: Mapping[str, Any] = {}
        """The repo's files by path, as huggingface_hub lists them."""
        self.refused: Collection[str] = ()
        """What must not be copied again, though no journal says so any more."""
        self._api: HfApi
        self._head: str
        self._operations: dict[str, CommitOperationAdd] = {}
        self._files: dict[str, Sent] = {}
        self._journal = UploadJournal()
        self._bytes = 0
        self._origin: ServerCopy | None = None

    def open(self) -> None:
        """Find the repo or create it, and see what it holds.

        Raises HubError where it cannot be written to, as far as that shows before the first file.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        self._api = api = HfApi(token=self.target.token)
        with explained_writing(self.repo):
            if "/" not in self.repo:
                self.repo = f"{patiently(api.whoami)['name']}/{self.repo}"
            try:
                info = patiently(lambda: api.model_info(self.repo))
            except RepositoryNotFoundError:
                info = self._create()
            if self.target.private and info.private is False:
                raise HubError(
                    f"{self.repo} exists and is public; --private does not change that.",
                    hint="make it private in its settings first, or choose another name",
                )
            self._head = str(info.sha)
            tree = patiently(lambda: list(api.list_repo_tree(self.repo, recursive=True, revision=self._head)))
        self.there = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}

    def _create(self) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        private = True if self.target.private else None
        patiently(lambda: self._api.create_repo(self.repo, private=private, exist_ok=True))
        try:
            return patiently(lambda: self._api.model_info(self.repo))
        except RepositoryNotFoundError as error:
            raise HubError(
                f"{self.repo} exists, but not as a model that you may see.", hint="choose another name"
            ) from error

    @property
    def key(self) -> JournalKey:
        """What the journal of an upload is of."""
        return {"endpoint": self._api.endpoint, "repo": self.repo}

    def remember(self, path: Path, *, by_name: bool = False) -> None:
        """Keep a journal at a path, and go on from the one that is there if it is of the same repo."""
        self._journal = UploadJournal(path, self.key, by_name=by_name)
        self._journal.refuse(self.refused)

    def offer(self, repo: object, commit: object) -> None:
        """Name the repo of this Hub, at a commit, that large files may be the same as."""
        if isinstance(repo, str) and isinstance(commit, str) and repo != self.repo:
            self._origin = ServerCopy(self._api, repo, commit, self._notify)

    def has(self, name: str) -> bool:
        """Whether a file was sent in this run."""
        return name in self._files

    def send(self, name: str, path: Path) -> None:
        """Upload a file now, unless the server has it; it may be removed afterwards.

        A file that is not here is taken to be what the journal says was uploaded under this name.
        """
        if known := self._journal.known(name, path):
            self._remembered(name, known)
            return
        from huggingface_hub import CommitOperationAdd

        stat = path.stat()
        if self._same(name, path):
            self._files[name] = Sent(name, stat.st_size, "unchanged")
            return
        if self._copied(name, path):
            return
        operation = CommitOperationAdd(name, path)
        self._notify(f"uploading {name}")
        with explained_writing(self.repo), without_bars():
            patiently(
                lambda: self._api.preupload_lfs_files(self.repo, [operation], create_pr=self.target.create_pr)
            )
        if operation._is_uploaded:  # noqa: SLF001 - nothing public tells
            self._journal.enter(name, stat.st_size, stat.st_mtime_ns, operation.upload_info.sha256.hex())
        else:  # a small file that goes with the commit itself
            operation = CommitOperationAdd(name, path.read_bytes())
        self._operations[name] = operation
        self._files[name] = Sent(name, stat.st_size, "uploaded")
        self._bytes += stat.st_size

    def _copied(self, name: str, path: Path) -> bool:
        """Have a file copied on the Hub, if that has it elsewhere; unless a commit with copies was refused before."""
        origin = self._origin if self._journal.may_copy(name) else None
        proof = origin.give(path, self.repo) if origin else None
        if not proof:
            return False
        stat = path.stat()
        self._notify(f"copied on the Hub: {name}")
        file = self._journal.enter(name, stat.st_size, stat.st_mtime_ns, proof)
        self._operations[name] = _uploaded_before(file)
        self._files[name] = Sent(name, stat.st_size, "copied")
        return True

    def _remembered(self, name: str, known: UploadedFile) -> None:
        """Take a file that is up already; if an earlier run was killed after its commit, there is nothing to do."""
        lfs = getattr(self.there.get(name), "lfs", None)
        committed = lfs is not None and lfs.sha256 == known.sha256
        self._files[name] = Sent(name, known.bytes, "unchanged" if committed else "uploaded")
        if not committed:
            self._operations[name] = _uploaded_before(known)

    def read(self, name: str) -> bytes | None:
        """A small file of the repo, as it was when `open` looked."""
        if name not in self.there:
            return None
        with explained_writing(self.repo), without_bars():
            path = patiently(
                lambda: self._api.hf_hub_download(
                    self.repo, name, revision=self._head, token=self.target.token
                )
            )
        return Path(path).read_bytes()

    def _same(self, name: str, source: Path | bytes) -> bool:
        """Whether the repo has a file with these bytes under this name."""
        there = self.there.get(name)
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if there is None or there.size != size:
            return False
        if there.lfs:
            return bool(hash_of(hashlib.sha256(), source) == there.lfs.sha256)
        return bool(hash_of(hashlib.sha1(b"blob %d\0" % size), source) == there.blob_id)  # noqa: S324 - git's

    def commit(self, small: Mapping[str, Path | bytes], stale: Sequence[str], message: str) -> Pushed:
        """Commit what was sent together with some small files, and delete others; the journal ends here.

        Without anything new there is no commit.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        for name, source in small.items():
            nbytes = len(source) if isinstance(source, bytes) else source.stat().st_size
            same = self._same(name, source)
            self._files[name] = Sent(name, nbytes, "unchanged" if same else "uploaded")
            if not same:
                self._operations[name] = CommitOperationAdd(name, source)
                self._bytes += nbytes
        operations = [
            *(self._operations[name] for name in sorted(self._operations)),
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
        ]
        url, head = f"{self._api.endpoint}/{self.repo}", self._head
        if operations:
            url, head = self._commit(operations, self.target.message or message)
        self._journal.forget()
        files = tuple(self._files[name] for name in sorted(self._files))
        return Pushed(
            repo=self.repo,
            url=url,
            commit=head,
            files=files,
            deleted=tuple(stale),
            bytes_uploaded=self._bytes,
        )

    def _commit(self, operations: Sequence[Any], message: str) -> tuple[str, str]:
        """One commit on top of the head that `open` has seen, or a pull request with it; its URL and hash."""

        def create() -> Any:
            return self._api.create_commit(
                self.repo,
                operations,
                commit_message=message,
                create_pr=self.target.create_pr,
                parent_commit=self._head,
            )

        with explained_writing(self.repo), without_bars():
            try:
                made = patiently(create)
            except Exception as error:
                if status_of(error) in (400, 404, 422):  # the server may have lost what the journal speaks of
                    self._journal.forget(name for name, file in self._files.items() if file.state == "copied")
                raise
        return made.pr_url or f"{self._api.endpoint}/{self.repo}", made.oid

    def close(self) -> None:
        """Close the journal; what it holds stays for the next run."""
        self._journal.close()


def _uploaded_before(file: UploadedFile) -> CommitOperationAdd:
    """An operation in the state in which `preupload_lfs_files` leaves one, made from the journal alone."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(file.name, b"")
    operation.upload_info = UploadInfo(size=file.bytes, sample=b"", sha256=bytes.fromhex(file.sha256))
    operation._upload_mode, operation._should_ignore, operation._is_uploaded = "lfs", False, True  # noqa: SLF001
    return operation
