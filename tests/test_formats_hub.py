"""Adapters of other tools on the Hub: a lone file of any name, one of several files, and diffusers' own name."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

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


@pytest.fixture
def pipeline_hub(tmp_path):
    """A Hub with a pipeline of diffusers, one of whose components has an index and shards."""
    folder = tmp_path / "pipeline"
    shutil.copytree(GOLDEN / CASES["kohya-lora-sd15"]["base"], folder)
    (file,) = (folder / "unet").glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    table = {name: f"{file.stem}-{1 + (n > 20):05d}-of-00002.safetensors" for n, name in enumerate(names)}
    for shard in sorted(set(table.values())):
        save_file({name: tensors[name] for name in names if table[name] == shard}, folder / "unet" / shard)
    index = {"metadata": {}, "weight_map": table}
    (folder / f"unet/{file.name}.index.json").write_text(json.dumps(index))
    server = Hub({"me/pipeline": folder}, tmp_path / "pipelines")
    yield server, folder
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("words", [(), ("--no-cache",)])
def test_a_pipeline_on_the_hub_is_a_base(pipeline_hub, tmp_path, words):
    """The same bytes as with the pipeline's folder: downloaded, or streamed component by component."""
    hub, folder = pipeline_hub
    adapter = next((GOLDEN / "kohya-lora-sd15").iterdir())
    for base, out in (("me/pipeline", "remote"), (folder, "local")):
        done = run(hub, tmp_path / "home", "merge", base, adapter, tmp_path / out, "--quiet", "--undo", "none", *words)
        assert done.returncode == 0, done.stderr
    files = [file for file in (tmp_path / "local").rglob("*") if file.is_file() and "dora_convert" not in file.parts]
    assert len(files) > 5
    for file in files:
        if file.name != "README.md":
            assert (tmp_path / "remote" / file.relative_to(tmp_path / "local")).read_bytes() == file.read_bytes()


def test_a_pipeline_on_the_hub_is_inspected_and_planned(pipeline_hub, tmp_path):
    """From headers alone: no weight file is downloaded."""
    hub, _ = pipeline_hub
    adapter = next((GOLDEN / "kohya-lora-sd15").iterdir())
    for words in (("inspect", "me/pipeline"), ("merge", "me/pipeline", adapter, tmp_path / "out", "--dry-run")):
        done = run(hub, tmp_path / "home", *words, "--json")
        assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    done = run(hub, tmp_path / "home", "merge", "me/pipeline", adapter, tmp_path / "out", "--max-shard-size", "1MB")
    assert done.returncode == 2
    assert "its components keep their files" in done.stderr
