"""Hold the report of a push, and of the upload that a merge does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..settings import format_size
from . import Report, Table, table


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

    def parts(self, *, every: bool) -> Iterator[Table | str]:
        """Yield the files, if asked for or in a dry run, and a summary."""
        if every or self.dry_run:
            rows = [(file.path, format_size(file.bytes), file.state) for file in self.files]
            yield table(("file", ">size", "state"), rows)
        yield from (f"deleted, stale beside these weights: {name}" for name in self.deleted)
        size = format_size(self.bytes_uploaded)
        if self.dry_run:
            yield f"{len(self.files)} files, {size}; nothing was uploaded"
            return
        same = sum(file.state == "unchanged" for file in self.files)
        copied = sum(file.state == "copied" for file in self.files)
        reused = f"{same} of them unchanged" + (f", {copied} copied on the Hub" if copied else "")
        yield f"{len(self.files)} files, {reused}; {size} uploaded in {self.seconds:.1f} s"
        yield self.url
