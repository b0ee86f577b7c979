"""Upload shards from the nodes of a cluster: to an object store, or to the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from uuid import uuid4

from ..errors import HubError, OutputError
from ..sources.hub_client import without_bars, writing_errors
from ..sources.object_store import ObjectStore, StoredFile
from ..storage.filenames import CLAIM, RECORD
from .upload import is_uploaded, upload_ahead


@dataclass(frozen=True)
class StoreDestination:
    """A folder in an object store. A file in it says which run it belongs to."""

    url: str
    token: str = field(default_factory=lambda: uuid4().hex)

    @cached_property
    def _store(self) -> ObjectStore:
        return ObjectStore(self.url)

    def __reduce__(self) -> tuple[type[StoreDestination], tuple[str, str]]:
        return StoreDestination, (self.url, self.token)

    def claim(self) -> None:
        """Write the token into the store."""
        self._store.write(f"{RECORD}/{CLAIM}", self.token.encode())

    def release(self) -> None:
        """Remove the token from the store."""
        self._store.remove([f"{RECORD}/{CLAIM}"])

    def refuse_late(self) -> None:
        """Raise OutputError if the store has another token by now."""
        if self._store.text(f"{RECORD}/{CLAIM}") != self.token:
            raise OutputError(f"{self.url} belongs to another run now.")

    def put(self, shard: str, path: Path) -> StoredFile:
        """Upload a shard."""
        return self._store.put(shard, path)


@dataclass(frozen=True)
class HubDestination:
    """A repo on the Hub. What a late node uploads there is seen by nobody: only the driver commits."""

    repo: str
    create_pr: bool

    def claim(self) -> None:
        """Do nothing: uploads of two runs do not meet before a commit."""

    def release(self) -> None:
        """Do nothing."""

    def refuse_late(self) -> None:
        """Do nothing."""

    def put(self, shard: str, path: Path) -> StoredFile:
        """Upload a shard with the node's own token; its tag is its sha256."""
        from huggingface_hub import HfApi

        with without_bars(), writing_errors(self.repo):
            operation = upload_ahead(HfApi(), self.repo, shard, path, create_pr=self.create_pr)
            if not is_uploaded(operation):
                raise HubError(
                    f"{self.repo} keeps {shard} in git itself, so that only the machine that commits can upload it.",
                    hint="the repo's .gitattributes must name *.safetensors, as the Hub writes it",
                )
        return StoredFile(path.stat().st_size, operation.upload_info.sha256.hex())
