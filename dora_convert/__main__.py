"""Run the command line as a process of its own: dora-convert, or python -m dora_convert."""

from __future__ import annotations

import os
import sys

from .torch_import import load_torch

STREAMS = {"stdin": "r", "stdout": "w", "stderr": "w"}
"""Python's standard streams, in the order of their file descriptors."""


def run() -> None:
    """Run the command line; torch's libraries are loaded beside it."""
    try:
        open_closed_streams()  # before a thread opens files
        load_torch(sys.argv[1:])
        from .cli import run as run_command
    except KeyboardInterrupt as error:
        from .cli import READING
        from .cli.sink import fail

        code = fail(error, as_json="--json" in sys.argv, reads=bool(READING.intersection(sys.argv[1:2])))
        sys.stderr.flush()
        os._exit(code)  # torch's libraries may be loading: the usual end would take them apart meanwhile
    run_command()


def open_closed_streams() -> None:
    """Open each closed standard stream as the null device, or the next file that is opened would be taken for it.

    No other thread may open files meanwhile.
    """
    for number, (name, mode) in enumerate(STREAMS.items()):
        if not _is_open(number):
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            if getattr(sys, name) is None:
                setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    run()
