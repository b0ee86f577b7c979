"""Describe the repo that an output is uploaded to, and the ways of a merge's files from and to the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from ..errors import UsageError
from ..options import OutputOptions
from ..output.folder import OutputFolder
from ..storage.filenames import INCOMING
from ..storage.refs import PathLike


@dataclass(frozen=True)
class PushTarget:
    """The Hub repo that an output is uploaded to, and the options of the upload."""

    repo: str
    private: bool = False
    create_pr: bool = False
    message: str | None = None
    token: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, options: OutputOptions) -> PushTarget | None:
        """Return the target that a verb's options name, or None without --push-to-hub.

        Raises UsageError for an option that needs --push-to-hub.
        """
        private, create_pr, message = options["private"], options["create_pr"], options["commit_message"]
        if (repo := options["push_to_hub"]) is not None:
            return cls(repo, private, create_pr, message, options["token"])
        given = {"--private": private, "--create-pr": create_pr, "--commit-message": message}
        for option in filter(given.get, given):
            raise UsageError(f"{option} goes with --push-to-hub.", hint="--push-to-hub REPO_ID")
        return None


@dataclass(frozen=True)
class HubRoutes:
    """The ways of a merge's files from and to the Hub."""

    target: PushTarget | None = None
    cache: bool = True
    """True if downloads stay in the cache of huggingface_hub."""
    local: bool = True
    """True if OUT stays on this machine."""

    def weights(self, folder: OutputFolder) -> Path | None:
        """Return the folder for the base's weights; None for the cache."""
        return None if self.cache else folder.state / INCOMING


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
