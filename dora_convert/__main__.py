"""Run the command line as a process of its own: dora-convert, or python -m dora_convert."""

from __future__ import annotations

import sys

from .torch_import import load_torch


def run() -> None:
    """Run the command line; torch's libraries are loaded beside it."""
    load_torch(sys.argv[1:])
    from .cli import run as run_command

    run_command()


if __name__ == "__main__":
    run()
