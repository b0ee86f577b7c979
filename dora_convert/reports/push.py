"""Hold the report of a push, and of the upload that a merge does."""

from __future__ import annotations

from dataclasses import dataclass

from . import Report


@dataclass(frozen=True)
class PushedFile:
    """One file of the commit: its path in the repo, its size in bytes, and its state."""

    path: str
    bytes: int
    state: str  # uploaded | copied | unchanged | planned


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """The result of an upload."""

    repo: str
    url: str
    commit: str
    """The new commit, or the repo's head if nothing was new."""
    files: tuple[PushedFile, ...]
    deleted: tuple[str, ...]
    bytes_uploaded: int


@dataclass(frozen=True, kw_only=True)
class PushReport(Pushed, Report):
    """The report of a push or of its dry run."""

    kind: str  # checkpoint | adapter
    left_behind: tuple[str, ...]
    """Files of the folder that are not uploaded."""
    dry_run: bool
    command: str = "push"
