"""Run the command line as a process of its own: dora-convert, or python -m dora_convert."""

from __future__ import annotations

import os
import sys

from .torch_import import load_torch


def run() -> None:
    """Run the command line; torch's libraries are loaded beside it."""
    try:
        load_torch(sys.argv[1:])
        from .cli import run as run_command
    except KeyboardInterrupt as error:
        from .cli.sink import fail

        code = fail(error, as_json="--json" in sys.argv)
        sys.stderr.flush()
        os._exit(code)  # torch's libraries may be loading: the usual end would take them apart meanwhile
    run_command()


if __name__ == "__main__":
    run()
