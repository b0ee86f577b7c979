"""Follow symbolic links only to files that belong to a model, so that no other file is copied into an output."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path

from ..errors import Fault, UnsupportedError

NOT_FILES = ("/proc", "/sys", "/dev")
"""File systems whose files hold what the kernel says, the user's environment included."""


def refuse_links(root: Path, paths: Iterable[Path], *, follow: bool) -> None:
    """Raise UnsupportedError, naming the link, if a file below `root` is a link to a file outside.

    The blobs of a Hub cache belong to its snapshots. With `follow`, a link may lead to any regular file.
    """
    inside, faults, hint = [root.resolve(), *_blobs(root)], [], None
    for path in sorted(paths):
        real = path.resolve()
        if any(folder == real or folder in real.parents for folder in inside):
            continue
        name = path.relative_to(root if root.is_dir() else root.parent).as_posix()
        if not _is_regular(real):
            faults.append(Fault(name, f"is a link to {real}, which is not a regular file"))
        elif not follow:
            faults.append(Fault(name, f"is a link to {real}"))
            hint = f"--follow-links copies them, if you trust the origin of {root.name}"
    if faults:
        raise UnsupportedError(
            f"{root.name} has links to files outside, which are not copied: {faults[0].what}.", faults=faults, hint=hint
        )


def linked_folders(root: Path) -> list[str]:
    """Return the links to folders below a folder; their files are not listed."""
    links = (path for path in root.rglob("*") if path.is_symlink() and path.is_dir())
    return sorted(path.relative_to(root).as_posix() for path in links)


def _blobs(root: Path) -> list[Path]:
    """Return the folder of a cached repo's contents, if `root` is one of the repo's snapshots or lies in one."""
    path = root.absolute()
    repos = [parent.parent.parent for parent in (path, *path.parents) if parent.parent.name == "snapshots"]
    return [(repo / "blobs").resolve() for repo in repos if "--" in repo.name]


def _is_regular(path: Path) -> bool:
    try:
        kernel = {Path(folder).stat().st_dev for folder in NOT_FILES if Path(folder).is_dir()}
        return stat.S_ISREG(path.stat().st_mode) and path.stat().st_dev not in kernel
    except OSError:
        return False
