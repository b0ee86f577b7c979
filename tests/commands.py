"""The command line within this process."""

from __future__ import annotations

import pytest

from dora_convert.cli import main


def exit_code(*words: object) -> int:
    """Run a command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return left.value.code
