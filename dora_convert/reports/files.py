"""Write the files that a report is shown in: checked before the work, and written completely or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from ..errors import OutputError
from ..storage.refs import is_address

Target = str | os.PathLike[str]


def check_file(path: Target, what: str = "the report", option: str = "--report FILE.html") -> None:
    """Refuse a path that cannot be written to, before the work begins; `what` and `option` are words for errors.

    Raises OutputError.
    """
    file = Path(path).expanduser()
    if is_address(path):
        raise OutputError(f"cannot write {what} {path}: it is an address", hint=f"name a file: {option}")
    try:
        folder = file.parent.stat().st_mode
        if not stat.S_ISDIR(folder) or not os.access(file.parent, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write {what} {file}: its folder cannot be written to")
        try:
            mode = file.stat().st_mode
        except FileNotFoundError:
            return
    except (OSError, ValueError) as error:
        raise _refusal(file, error, what) from error
    if not stat.S_ISREG(mode):
        kind = "is a folder" if stat.S_ISDIR(mode) else "is not a regular file"
        raise OutputError(f"cannot write {what} {file}: it {kind}", hint=f"name a file: {option}")


def write_file(path: Target, data: bytes, what: str = "the report") -> None:
    """Write a file completely or not at all, and replace a file of the same name.

    Raises OutputError.
    """
    file = Path(path).expanduser()
    temporary = file.parent / f".dora-convert-{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as opened:
            opened.write(data)
        temporary.replace(file)
    except (OSError, ValueError) as error:
        raise _refusal(file, error, what) from error
    finally:
        temporary.unlink(missing_ok=True)


def _refusal(file: Path, error: OSError | ValueError, what: str) -> OutputError:
    why = error.strerror if isinstance(error, OSError) else str(error)
    return OutputError(f"cannot write {what} {file}: {why}")
