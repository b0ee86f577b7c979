"""Copy large files from another repo of the same Hub on the server, instead of uploading them.

The route is that of CommitOperationCopy in huggingface_hub 2.4. CommitOperationCopy itself asks only when the
commit is made, which is too late for a run that keeps no local files: a refused copy could not be uploaded
any more. The Hub copies files on Xet, within one storage region.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sources.hub_client import connection_errors, with_retries
from ..storage.reader import sha256

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def _refusals() -> tuple[type[Exception], ...]:
    return (*connection_errors(), ValueError)


class CopySource:
    """A repo at a commit, whose files may be copied into the target repo."""

    def __init__(self, api: HfApi, repo: str, commit: str, notify: Callable[[str], None]) -> None:
        self._api, self.repo, self._commit, self._notify = api, repo, commit, notify
        self._refused = False

    def copy(self, path: Path, target: str) -> str | None:
        """Copy a local file's twin from this repo into `target`; return its sha256, or None if not copied."""
        size = path.stat().st_size
        if self._refused or size not in {file.size for file in self._files.values()}:
            return None
        file = self._files.get(digest := sha256(path))
        return digest if file and self._ask(file, target) else None

    @cached_property
    def _files(self) -> dict[str, Any]:
        """The repo's files on Xet by sha256; empty if they cannot be listed."""
        try:
            tree = with_retries(
                lambda: list(self._api.list_repo_tree(self.repo, recursive=True, revision=self._commit))
            )
        except _refusals():
            return {}
        large = [(entry, getattr(entry, "lfs", None)) for entry in tree if getattr(entry, "xet_hash", None)]
        return {lfs.sha256: entry for entry, lfs in large if lfs}

    def _ask(self, file: Any, target: str) -> bool:
        """Ask the Hub to copy a file and return True if it did; after a refusal nothing more is asked."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = f"{self._api.endpoint}/api/models/{self.repo}/lfs-files/duplicate"
        wanted = {"xetHash": file.xet_hash, "sha256": file.lfs.sha256, "filename": file.path}
        body = {"target": {"type": "model", "name": target}, "files": [wanted]}

        def post() -> Any:
            response = get_session().post(url, headers=build_hf_headers(token=self._api.token), json=body)
            hf_raise_for_status(response)
            return response.json()

        try:
            failed = with_retries(post).get("failed") or ()
            why = "; ".join(str(failure.get("error")) for failure in failed)
        except _refusals() as error:
            why = str(error).partition("\n")[0]
        if why:
            self._refused = True
            self._notify(f"{self.repo} copies nothing, so its files are uploaded: {why}")
        return not why
