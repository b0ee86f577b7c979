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
        return None if self.cache else folder.state / INCOMING


def place_of(out: PathLike | None, routes: HubRoutes, refs: Sequence[str]) -> Path:
    """OUT; where nothing is to stay, a folder of this merge's own in the user's cache, for what is on its way.

    Raises UsageError for an OUT too many or too few.
    """
    if routes.local:
        if out is None:
            raise UsageError("merge needs OUT, or --in-place, or --push-to-hub REPO_ID --no-local.")
        return Path(out)
    if routes.target is None:
        raise UsageError("--no-local goes with --push-to-hub.", hint="--push-to-hub REPO_ID")
    if out is not None:
        raise UsageError("With --no-local there is no OUT.")
    from huggingface_hub import constants

    key = xxhash.xxh3_64_hexdigest("\n".join([constants.ENDPOINT, routes.target.repo, *refs]).encode())
    return Path(constants.HF_HOME) / "dora_convert" / "merges" / key / "model"
