"""Where a merge's inputs come from and its output goes to, as far as the Hub has a part in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..errors import UsageError
from ..output.folder import OutputFolder
from ..reports.push import Target
from ..storage.refs import PathLike

INCOMING = "incoming"
"""The folder in OUT.partial's record that inputs come to which do not stay."""


@dataclass(frozen=True)
class HubRoutes:
    """Where things come from and go to."""

    target: Target | None = None
    cache: bool = True
    local: bool = True
    """Whether OUT stays here."""

    def weights(self, folder: OutputFolder) -> Path | None:
        """Where the base's weights come to; None for the cache."""
        return None if self.cache else folder.record / INCOMING


def transit_folder(out: PathLike | None, routes: HubRoutes, refs: Sequence[str]) -> Path:
    """Return the folder, in the user's cache, of a merge that keeps nothing: files pass through it to the Hub.

    Raises UsageError for an OUT, and without --push-to-hub.
    """
    if routes.target is None:
        raise UsageError("--no-local goes with --push-to-hub.", hint="--push-to-hub REPO_ID")
    if out is not None:
        raise UsageError("--no-local takes no OUT.")
    from huggingface_hub import constants

    key = xxhash.xxh3_64_hexdigest("\n".join([constants.ENDPOINT, routes.target.repo, *refs]).encode())
    return Path(constants.HF_HOME) / "dora_convert" / "merges" / key / "model"
