"""The command line: what is on stdout, what on stderr, and the exit code."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from dora_convert import __version__
from dora_convert.cli import main
from dora_convert.output.shards import ShardFiles

from .toy import contents, edit_json, make_adapter


def test_merge(run, tmp_path, base, adapter):
    """A table on stdout that ends with where the result is; choices and warnings on stderr; exit code 0."""
    code, out, err = run("merge", base.path, adapter, tmp_path / "out")
    assert code == 0
    assert "18 adapter tensors: 18 merged" in out
    assert "13 tensors: 6 merged, 0 replaced, 7 copied" in out
    assert "0 of" in out
    assert out.splitlines()[-1] == f"out: {tmp_path / 'out'}"
    assert err.startswith(("device: cpu, float64", "device: cuda"))


def test_quiet(run, tmp_path, base, adapter):
    """--quiet: the result's path and nothing else anywhere."""
    assert run("merge", base.path, adapter, tmp_path / "out", "-q") == (0, f"{tmp_path / 'out'}\n", "")


def test_verbose_lists_every_module(run, tmp_path, base, adapter):
    """--verbose: each module by its full name."""
    _, out, _ = run("merge", base.path, adapter, tmp_path / "out", "-v")
    assert out.count("layers.0.mlp.up_proj") == 1
    assert out.count("layers.1.mlp.up_proj") == 1


def test_json(run, tmp_path, base, adapter):
    """--json: one document with the fields of the contract."""
    code, out, _ = run("merge", base.path, adapter, tmp_path / "out", "--json")
    report = json.loads(out)
    assert code == 0
    assert {
        "schema", "command", "version", "seconds", "base", "adapters", "out", "device", "compute_dtype", "tensors",
        "bytes_written", "peak_memory_bytes", "ledger", "resumed", "verified", "lost", "undo",
    } <= report.keys()  # fmt: skip
    assert (report["schema"], report["command"], report["version"]) == (1, "merge", __version__)
    assert {"total", "merged", "replaced", "added", "copied"} <= report["tensors"].keys()
    assert {"checked", "wrong_elements", "max_ulp"} == report["verified"].keys()
    assert all({"tensor", "fate", "into", "why"} == entry.keys() for entry in report["ledger"])
    assert report["resumed"] is False
    assert report["undo"] == "norms"
    assert 0 < report["lost"] < 1
    assert report["out"] == str(tmp_path / "out")


def test_dry_run(run, tmp_path, base, adapter):
    """--dry-run: the plan, as a table and as JSON; nothing is written."""
    before = contents(tmp_path)
    code, out, _ = run("merge", base.path, adapter, tmp_path / "out", "--dry-run")
    assert code == 0
    assert "nothing was written" in out
    _, out, _ = run("merge", base.path, adapter, tmp_path / "out", "--dry-run", "--json")
    assert {"tensors", "shards", "bytes_out", "undo_bytes", "memory"} <= json.loads(out)["plan"].keys()
    assert contents(tmp_path) == before


def test_base_from_the_adapter(run, tmp_path, base, adapter):
    """Without BASE, the one that the adapter names is used and printed."""
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base.path))
    code, _, err = run("merge", adapter, tmp_path / "out")
    assert code == 0
    assert err.startswith("base: base, as adapter says\n")
    assert "trained on" not in err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "does not say which base"),
        ("/nowhere/model", "'/nowhere/model', is not here"),
        ("unsloth/llama-3-8b-bnb-4bit", "a quantised copy"),
        ("TheBloke/x-GPTQ", "a quantised copy"),
    ],
)
def test_adapters_whose_base_will_not_do(run, tmp_path, adapter, name, message):
    """The error says which base that was, and the command to type."""
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=name)
    code, out, err = run("merge", adapter, tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in err
    assert f"dora-convert merge BASE {shlex.quote(str(adapter))} {shlex.quote(str(tmp_path / 'out'))}" in err


def test_another_base_than_named_is_a_warning(run, tmp_path, base, adapter):
    """The adapter names its base; another one is used if asked for, with a warning."""
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="org/other")
    code, _, err = run("merge", base.path, adapter, tmp_path / "out")
    assert code == 0
    assert "warning: adapter was trained on org/other; BASE is base" in err


def test_swapped(run, tmp_path, base, adapter):
    """BASE and ADAPTER exchanged: the command that was meant."""
    code, _, err = run("merge", adapter, base.path, tmp_path / "out")
    assert code == 2
    assert "Hint: " + shlex.join(["dora-convert", "merge", *map(str, (base.path, adapter, tmp_path / "out"))]) in err


def test_swapped_in_verify(run, tmp_path, base, adapter):
    """The hint has the verb that was typed, and a verb that only reads does not say that nothing was written."""
    code, _, err = run("verify", adapter, base.path, tmp_path / "merged")
    assert code == 2
    assert f"dora-convert verify {base.path} {adapter} {tmp_path / 'merged'}" in err
    assert "Nothing was written" not in err


def test_adapter_in_a_subfolder(run, tmp_path, base, adapter):
    """A folder of adapters: the ones inside are listed."""
    many = tmp_path / "many"
    many.mkdir()
    adapter.rename(many / "checkpoint-40")
    make_adapter(many / "style", base, dora=False)
    code, _, err = run("merge", base.path, many, tmp_path / "out")
    assert code == 2
    assert "checkpoint-40, style" in err


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["{base}", "{adapter}s", "{out}"], "does not exist", "did you mean"),
        (["{base}/none/at/all", "{adapter}", "{out}"], "does not exist", "does not exist either"),
        (["nonsense", "{adapter}", "{out}"], "'nonsense' does not exist", "org/name"),
        (["{base}", "{base}", "{out}"], "is a model, not an adapter", ""),
        (["{base}", "{adapter}", "{out}", "--max-memory", "much"], "not a size", "160MiB"),
        (["{base}", "{adapter}", "{out}", "--max-shard-size", "0"], "not a size", ""),
        (["{base}", "{adapter}", "{out}", "--device", "cuda:99"], "usable CUDA devices", ""),
        (["{base}", "{adapter}", "{out}", "--device", "abacus"], "--device 'abacus'", ""),
        (["{base}", "{adapter}", "{out}", "--device", "cuda:x"], "--device 'cuda:x'", ""),
    ],
)
def test_mistakes(run, tmp_path, base, adapter, words, message, hint):
    """Exit code 2, one clear message, no traceback, nothing written."""
    places = {"base": base.path, "adapter": adapter, "out": tmp_path / "out"}
    before = contents(tmp_path)
    code, out, err = run("merge", *(word.format(**places) for word in words))
    assert (code, out) == (2, "")
    assert message in err
    assert hint in err
    assert "Traceback" not in err
    assert contents(tmp_path) == before


def test_errors_as_json(run, tmp_path, base, adapter):
    """With --json, an error is one JSON document on stderr, a mistake in the command line included."""
    for words in (["merge", base.path, "nonsense", tmp_path / "out"], ["merge", "--frobnicate"], ["merge", "x"]):
        code, out, err = run(*words, "--json")
        assert (code, out) == (2, "")
        assert {"kind", "message", "hint"} <= json.loads(err)["error"].keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspct"], "Did you mean 'inspect'?"),
        (["merge", "--dryrun"], "--dry-run"),
        (["merge", "x"], "needs an ADAPTER and OUT"),
    ],
)
def test_usage(run, words, message):
    """A typo gets a suggestion, and exit code 2."""
    code, _, err = run(*words)
    assert code == 2
    assert message in err


def test_failed_check(run, tmp_path, base, adapter, monkeypatch):
    """A self-check that fails: exit code 1, the tensor, and nothing published."""
    write = ShardFiles.write
    monkeypatch.setattr(
        ShardFiles, "write", lambda self, item, at, data: write(self, item, at, memoryview(bytes(len(data))))
    )
    code, _, err = run("merge", base.path, adapter, tmp_path / "out")
    assert code == 1
    assert "model.layers.0.mlp.up_proj.weight" in err
    assert "Nothing was published." in err
    assert not (tmp_path / "out").exists()


def test_damaged_adapter(run, tmp_path, base, adapter):
    """NaN in the adapter: exit code 2 and the tensor's name."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = min(tensors)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    code, _, err = run("merge", base.path, adapter, tmp_path / "out")
    assert code == 2
    assert name in err


def test_interrupt(run, tmp_path, base, adapter, monkeypatch):
    """Ctrl-C: exit code 130, and the word that the same command continues."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardFiles, "write", stop)
    code, _, err = run("merge", base.path, adapter, tmp_path / "out")
    assert code == 130
    assert "rerun the same command to resume" in err


def test_interrupted_reading(run, base, adapter, monkeypatch):
    """Ctrl-C in a verb that keeps nothing does not promise to resume."""
    from dora_convert.verbs import analyze

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(analyze, "open_base", stop)
    code, out, err = run("analyze", base.path, adapter)
    assert (code, out) == (130, "")
    assert "begins again" in err
    assert "resume" not in err


def test_interrupted_while_importing(tmp_path):
    """With -m, too, the exit code is 130, even where Ctrl-C comes while a dataclass is made of strings."""
    (tmp_path / "stopped.py").write_text(
        "from dora_convert import cli\n"
        "cli.group.main = lambda *_, **__: exec('raise KeyboardInterrupt')\n"
        "cli.main(['inspect', 'x'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.fspath(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-m", "stopped"], env=environment, capture_output=True, check=False)
    assert done.returncode == 130


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_interrupted_at_the_start(words):
    """Ctrl-C before the command line is imported gives no traceback either."""
    code = (
        "import sys\n"
        "from dora_convert import __main__\n"
        "class Stopping:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'dora_convert.cli':\n"
        "            sys.meta_path.remove(self)\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stopping())\n"
        "__main__.run()\n"
    )
    command = [sys.executable, "-c", code, "inspect", "x", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith('{"error": {"kind": "interrupted"' if words else "Error: Interrupted.")


def test_a_bug_is_called_one(run, tmp_path, base, adapter, monkeypatch):
    """An unexpected error is reported in one line, and raised with DORA_CONVERT_DEBUG."""

    def broken(*_):
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(ShardFiles, "write", broken)
    code, _, err = run("merge", base.path, adapter, tmp_path / "out")
    assert code == 2
    assert "ZeroDivisionError: surprise" in err
    assert "DORA_CONVERT_DEBUG=1" in err
    monkeypatch.setenv("DORA_CONVERT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["merge", str(base.path), str(adapter), str(tmp_path / "out2")])


def test_colour(run, monkeypatch):
    """NO_COLOR and FORCE_COLOR are obeyed; a pipe has no colour of its own."""
    assert "\x1b" not in run("merge", "a", "b")[2]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" in run("merge", "a", "b")[2]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("merge", "a", "b")[2]


@pytest.mark.parametrize("words", [["-h"], ["--version"], ["merge", "-h"], ["merge", "no", "where"], []])
def test_nothing_heavy_is_imported_for_help_or_mistakes(words):
    """Help, the version and a mistyped path do not wait for torch."""
    code = f"""
import sys
from dora_convert.cli import main
try:
    main({words})
except SystemExit:
    pass
heavy = {{"torch", "safetensors", "huggingface_hub", "rich", "tqdm", "transformers", "peft"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_module_entry_point():
    """python -m dora_convert is the same program."""
    done = subprocess.run(
        [sys.executable, "-m", "dora_convert", "--version"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"dora-convert {__version__}\n")
