"""Large files that another repo of the same Hub has, too: taken over there instead of sent.

By the route of huggingface_hub 2.4's CommitOperationCopy, which asks only when a commit is made: where nothing stays here,
the file would be gone by then if the Hub refuses. The Hub copies files on Xet, within one storage region.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sources.hub_client import patiently, unreachable
from ..storage.reader import sha256

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class ServerCopy:
    """A repo at a commit, and what of it may be copied."""

    def __init__(self, api: HfApi, repo: str, commit: str, notify: Callable[[str], None]) -> None:
        self._api, self.repo, self._commit, self._notify = api, repo, commit, notify
        self._willing = True

    def give(self, path: Path, target: str) -> str | None:
        """The sha256 of a file here, if it is one of the repo's that the target has now, too; else None."""
        size = path.stat().st_size
        if not self._willing or size not in {file.size for file in self._files.values()}:
            return None
        file = self._files.get(proof := sha256(path))
        return proof if file and self._copied(file, target) else None

    @cached_property
    def _files(self) -> dict[str, Any]:
        """Its files on Xet by sha256; none where they cannot be listed."""
        refusals: tuple[type[Exception], ...] = (*unreachable(), ValueError)
        try:
            tree = patiently(
                lambda: list(self._api.list_repo_tree(self.repo, recursive=True, revision=self._commit))
            )
        except refusals:
            return {}
        large = [(entry, getattr(entry, "lfs", None)) for entry in tree if getattr(entry, "xet_hash", None)]
        return {lfs.sha256: entry for entry, lfs in large if lfs}

    def _copied(self, file: Any, target: str) -> bool:
        """Ask for a copy; after a no, nothing more is asked for."""
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import get_session, hf_raise_for_status

        refusals: tuple[type[Exception], ...] = (*unreachable(), ValueError)
        url = f"{self._api.endpoint}/api/models/{self.repo}/lfs-files/duplicate"
        wanted = {"xetHash": file.xet_hash, "sha256": file.lfs.sha256, "filename": file.path}
        asked = {"target": {"type": "model", "name": target}, "files": [wanted]}

        def ask() -> Any:
            answer = get_session().post(url, headers=build_hf_headers(token=self._api.token), json=asked)
            hf_raise_for_status(answer)
            return answer.json()

        try:
            why = "; ".join(str(refused.get("error")) for refused in patiently(ask).get("failed") or ())
        except refusals as error:
            why = str(error).partition("\n")[0]
        if why:
            self._willing = False
            self._notify(f"{self.repo} copies nothing, so its files are uploaded: {why}")
        return not why
