"""Where commands run, and where their outputs are: a folder that is gone, a name that looks like an option."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dora_convert.cli.merge import next_steps

from .toy import write_json

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform == "win32", reason="the current folder cannot be removed there")
@pytest.mark.parametrize(("words", "code"), [("merge {0}/base {0}/adapter {0}/out", 2), ("merge --help", 0)])
def test_the_current_folder_is_gone(tmp_path, base, adapter, words, code):
    """One clear error, even for absolute paths: torch's MKL would end the process. Help needs no folder."""
    (gone := tmp_path / "gone").mkdir()
    program = (
        f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})\nfrom dora_convert.__main__ import run; run()"
    )
    line = [sys.executable, "-c", program, *words.format(tmp_path).split()]
    done = subprocess.run(
        line, check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert done.returncode == code
    if code:
        assert "Error: The current folder no longer exists." in done.stderr
        assert "MKL" not in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_name_that_looks_like_an_option(tmp_path, monkeypatch):
    """The commands that merge advises take the folder for a folder."""
    monkeypatch.chdir(tmp_path)
    Path("-x").mkdir()
    write_json(Path("-x/config.json"), {"architectures": ["LlamaForCausalLM"]})
    steps = list(next_steps(Path("-x")))
    assert any("vllm serve ./-x" in step for step in steps)
    assert not any(" -x" in step for step in steps)


@pytest.mark.parametrize(("verb", "kept"), [("inspect", False), ("verify", False), ("merge", True)])
def test_interrupted_before_the_first_import(verb, kept):
    """A command that writes nothing promises nothing that is kept, however early Ctrl-C comes."""
    program = (
        "import dora_convert.__main__ as m\ndef stop(words): raise KeyboardInterrupt\nm.load_torch = stop\nm.run()"
    )
    line = [sys.executable, "-c", program, verb, "a", "b", "c"]
    done = subprocess.run(
        line, check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert done.returncode == 130
    assert ("finished tensors are kept" in done.stderr) == kept
    assert ("Nothing was published" in done.stderr) == kept
