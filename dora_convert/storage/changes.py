"""Notice input files that change while they are read: none of their bytes may reach an output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import RefError


class FileState(NamedTuple):
    """The numbers that a file system gives a file, from which a change of the contents shows."""

    inode: int
    size: int
    mtime: int
    ctime: int
    attributes: list[int]
    """Mode, owner, group and number of names: a change of these alone also sets `ctime`."""
    device: int = 0
    """Left out of journals: a disk may get another number when it is mounted again."""


FileStates = Mapping[Path, FileState]
"""Files of one input, as they were before the first of them was read."""


def file_states(paths: Iterable[Path]) -> dict[Path, FileState]:
    """Return the states of files; a file that cannot be examined is left to its reader."""
    states = {path: _state(path) for path in paths}
    return {path: state for path, state in states.items() if state}


def _state(path: Path) -> FileState | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return FileState(
        inode=stat.st_ino,
        size=stat.st_size,
        mtime=stat.st_mtime_ns,
        ctime=stat.st_ctime_ns,
        attributes=[stat.st_mode, stat.st_uid, stat.st_gid, stat.st_nlink],
        device=stat.st_dev,
    )


def change(before: FileState, after: FileState | None) -> str | None:
    """Return how a file's contents have changed, as the end of "the file was …"; None if they have not."""
    if after is None:
        return "removed"
    if (before.device, before.inode) != (after.device, after.inode):
        return "replaced"
    if (before.size, before.mtime) != (after.size, after.mtime):
        return "rewritten"
    # a time that was set back leaves a new ctime; chmod and a hard link do so, too, and show in the attributes
    touched = before.ctime != after.ctime and before.attributes == after.attributes
    return "rewritten, and its time was set back" if touched else None


def refuse_changed(*inputs: FileStates) -> None:
    """Raise RefError, naming the file, if an input's files are not as they were before they were read."""
    for path, before in ((path, state) for states in inputs for path, state in states.items()):
        if how := change(before, _state(path)):
            raise RefError(
                f"{path} changed while it was read: the file was {how}.",
                hint="rerun the same command when nothing else writes there",
            )


def journal_lines(states: FileStates) -> list[list[object]]:
    """Return states as JSON values for a journal's key."""
    return [[str(path.resolve()), *state[:5]] for path, state in states.items()]


def same_lines(earlier: object, lines: list[list[object]]) -> bool:
    """Return True if lines of an earlier journal are of files with the same contents."""
    if not isinstance(earlier, list) or len(earlier) != len(lines):
        return False
    return all(old == new or _same_file(old, new) for old, new in zip(earlier, lines, strict=True))


def _same_file(old: object, new: list[object]) -> bool:
    """Return True for the same path, if nothing but the attributes has changed."""
    if not isinstance(old, list) or not len(old) == len(new) == len(FileState._fields) or old[0] != new[0]:
        return False
    return change(FileState(*old[1:]), FileState(*new[1:])) is None  # type: ignore[arg-type]
