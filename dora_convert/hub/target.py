"""Describe the repo that an output is uploaded to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from ..errors import UsageError
from ..options import OutputOptions
from ..storage.refs import HUB, PathLike


@dataclass(frozen=True)
class PushTarget:
    """The Hub repo that an output is uploaded to, and the options of the upload."""

    repo: str
    private: bool = False
    create_pr: bool = False
    message: str | None = None
    token: str | None = field(default=None, repr=False)
    local: bool = True
    """True if OUT stays on this machine."""

    def check(self) -> None:
        """Raise RefError for a name that no repo can have, before anything is read or sent."""
        from huggingface_hub.utils import validate_repo_id

        from ..sources.hub_client import writing_errors

        with writing_errors(self.repo):
            validate_repo_id(self.repo)

    @property
    def address(self) -> str:
        """The repo's address."""
        return f"{HUB}{self.repo}"

    @classmethod
    def parse(cls, options: OutputOptions, *, local: bool = True) -> PushTarget | None:
        """Return the target that a verb's options name, or None without --push-to-hub.

        Raises UsageError for an option that needs --push-to-hub, RefError for an invalid repo id.
        """
        private, create_pr, message = options["private"], options["create_pr"], options["commit_message"]
        if (repo := options["push_to_hub"]) is not None:
            target = cls(repo, private, create_pr, message, options["token"], local=local)
            target.check()
            return target
        given = {"--private": private, "--create-pr": create_pr, "--commit-message": message, "--no-local": not local}
        for option in filter(given.get, given):
            raise UsageError(f"{option} goes with --push-to-hub.", hint="--push-to-hub REPO_ID")
        return None

    def transit_folder(self, out: PathLike | None, refs: Sequence[str]) -> Path:
        """Return the folder in the user's cache that files pass through on their way to the Hub.

        Raises UsageError for an OUT.
        """
        if out is not None:
            raise UsageError("--no-local takes no OUT.")
        from huggingface_hub import constants

        key = xxhash.xxh3_64_hexdigest("\n".join([constants.ENDPOINT, self.repo, *refs]).encode())
        return Path(constants.HF_HOME) / "dora_convert" / "merges" / key / "model"
