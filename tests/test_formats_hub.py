"""Adapters of other tools on the Hub: a lone file of any name, one of several files, and diffusers' own name."""

from __future__ import annotations

import json
import shutil

import pytest

from .hubserver import Hub, run
from .test_formats import CASES, GOLDEN


@pytest.fixture
def kohya_hub(tmp_path):
    """A Hub with a LoRA of kohya's form alone, two of them in a folder, and one of diffusers' form."""
    root = tmp_path / "hub"
    repos = {}
    for name, files in {
        "me/lone": {"style.safetensors": "kohya-lora-sd15"},
        "me/two": {"a.safetensors": "kohya-lora-sd15", "b.safetensors": "onetrainer-dora-row"},
        "me/diffusers": {"pytorch_lora_weights.safetensors": "diffusers-lora"},
    }.items():
        folder = root / name.replace("/", "-")
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("# a LoRA\n")
        for file, case in files.items():
            shutil.copy(next((GOLDEN / case).iterdir()), folder / file)
        repos[name] = folder
    server = Hub(repos, root)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("ref", "format_name", "maker"),
    [
        ("me/lone", "kohya", None),
        ("hf://me/two/b.safetensors", "kohya", "OneTrainer"),
        ("me/diffusers", "diffusers", None),
    ],
)
def test_a_file_on_the_hub_is_an_adapter(kohya_hub, tmp_path, ref, format_name, maker):
    """inspect says what it is, and merge takes it."""
    done = run(kohya_hub, tmp_path / "home", "inspect", ref, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["kind"], report["format"], report["maker"]) == ("adapter", format_name, maker)
    base = GOLDEN / CASES["kohya-lora-sd15"]["base"]
    done = run(kohya_hub, tmp_path / "home", "merge", base, ref, tmp_path / "out", "--quiet", "--undo", "none")
    assert done.returncode == 0, done.stderr


def test_one_of_several_files_is_named(kohya_hub, tmp_path):
    """A repo of two adapters: the error says to name one."""
    base = GOLDEN / CASES["kohya-lora-sd15"]["base"]
    done = run(kohya_hub, tmp_path / "home", "merge", base, "me/two", tmp_path / "out", "--quiet")
    assert done.returncode == 2
    assert "a.safetensors" in done.stderr
