"""Count what a plain merge loads, and hold docs/design.md's reading list to the files that it runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .toy import make_adapter, make_base

ROOT = Path(__file__).parent.parent
MOST_MODULES, MOST_FILES = 71, 20
NEVER = (
    "dora_convert.hub",
    "dora_convert.undo",
    "dora_convert.output.in_place",
    "dora_convert.sources.download",
    "numpy",
)

MERGE = """
import atexit, sys
from dora_convert.cli import run
atexit.register(lambda: print(*sorted(name for name in sys.modules if name.split(".")[0] in ("dora_convert", "numpy"))))
sys.argv[1:1] = ["merge", "--quiet"]
run()
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> list[str]:
    """The modules of ours that a merge of two local folders loads, from the command line."""
    folder = tmp_path_factory.mktemp("modules")
    adapter = make_adapter(folder / "adapter", make_base(folder / "base"), dora=False)
    words = [sys.executable, "-c", MERGE, folder / "base", adapter, folder / "out"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.splitlines()[-1].split()


def test_a_plain_merge_loads_little(loaded):
    """A merge that needs no Hub, no undo record and no second output loads none of their code, nor NumPy."""
    assert [name for name in loaded if name.startswith(NEVER)] == []
    assert len(loaded) <= MOST_MODULES, loaded


def test_the_reading_list_is_what_runs(loaded):
    """Each file that docs/design.md lists for the happy path exists, and a merge loads it."""
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\d+\. `([\w/.]+\.py)`", page, re.MULTILINE)
    assert 0 < len(listed) <= MOST_FILES
    for file in listed:
        module = f"dora_convert/{file}".removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        assert module in loaded, file
