"""What a push is asked for, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import UsageError
from ..options import OutputOptions


@dataclass(frozen=True)
class Target:
    """Where an upload goes, and how."""

    repo: str
    private: bool = False
    create_pr: bool = False
    message: str | None = None
    token: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, options: OutputOptions) -> Target | None:
        """Return the target that a verb's options name; None without --push-to-hub.

        Raises UsageError for options that need --push-to-hub.
        """
        private, create_pr, message = options["private"], options["create_pr"], options["commit_message"]
        if (repo := options["push_to_hub"]) is not None:
            return cls(repo, private, create_pr, message, options["token"])
        given = {"--private": private, "--create-pr": create_pr, "--commit-message": message}
        for option in filter(given.get, given):
            raise UsageError(f"{option} goes with --push-to-hub.", hint="--push-to-hub REPO_ID")
        return None


@dataclass(frozen=True)
class Sent:
    """One file of the commit: its path in the repo, bytes, and where it came from."""

    path: str
    bytes: int
    state: str  # uploaded | copied | unchanged


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What came of an upload; `commit` is the repo's head where nothing was new."""

    repo: str
    url: str
    commit: str
    files: tuple[Sent, ...]
    deleted: tuple[str, ...]
    bytes_uploaded: int
