"""The command line around the verbs: groups in help, completion, defaults of a machine, env, and what to do next."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dora_convert
from dora_convert.cli import COMMANDS, main
from dora_convert.cli.help import GROUPS

from .spawner import Process
from .toy import edit_json

SHELL = """
source {folder}/script
COMP_WORDS=(dora-convert {words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_dora_convert_completion {folder}/dora-convert
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def test_options_stand_in_groups(run):
    """Each with the address of its page; no option is lost."""
    for name in COMMANDS:
        text = run(name, "-h")[1]
        titles = re.findall(r"^(\w.*?) \(https://\S+\):$", text, re.MULTILINE)
        assert titles[-1] == "Answer"
        assert set(titles) <= set(GROUPS)
        assert text.rstrip().endswith(f"cli/#{name}")
        assert " --json" in text
    merge = run("merge", "-h")[1]
    groups = re.split(r"^(\w.*?) \(https.*$", merge, flags=re.MULTILINE)
    hub = groups[groups.index("Hub") + 1]
    assert "--push-to-hub" in hub
    assert "--device" not in hub
    assert "DORA_CONVERT_MAX_MEMORY" in merge


@pytest.fixture
def complete(tmp_path, monkeypatch):
    """Return the completions that bash would show for the words of a command line."""
    if not (bash := shutil.which("bash")):
        pytest.skip("needs bash")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub/models--org--model").mkdir(parents=True)
    for name in ("base model", "org-local"):
        (tmp_path / name).mkdir()
    program = tmp_path / "dora-convert"
    program.write_text(f'#!{bash}\nexec "{sys.executable}" -m dora_convert "$@"\n')
    program.chmod(0o755)
    script = subprocess.run([program, "completion", "show", "bash"], capture_output=True, text=True, check=True)
    (tmp_path / "script").write_text(script.stdout)

    def call(words):
        code = SHELL.format(folder=tmp_path, words=words)
        return subprocess.run(
            [bash, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
        ).stdout.split("\n")[:-1]

    return call


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mer", ["merge"]),
        ("merge ba", ["base model"]),
        ("merge or", ["org/model", "org-local"]),
        ("merge x y --dtype bf1", ["bf16"]),
        ("merge x y --compute-dtype float3", ["float32"]),
        ("merge x y --devi", ["--device"]),
        ("verify --report scr", ["script"]),
        ("inspect x --base org/", ["org/model"]),
        ("completion install z", ["zsh"]),
    ],
)
def test_bash_completes(complete, words, expected):
    """Commands, paths with spaces, repos of the cache, choices and options."""
    assert complete(words) == expected


def test_completion_is_installed_where_the_shell_looks(tmp_path, monkeypatch, run):
    """The path is the answer; the next step is a notice."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("ZDOTDIR", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    code, out, _ = run("completion", "install")
    assert code == 0
    assert out.strip() == str(tmp_path / "config/fish/completions/dora-convert.fish")
    for shell, file in (("bash", "data/bash-completion/completions/dora-convert"), ("zsh", ".zfunc/_dora-convert")):
        assert run("completion", "install", shell)[0] == 0
        assert "_DORA_CONVERT_COMPLETE" in (tmp_path / file).read_text()
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    code, _, err = run("completion", "show")
    assert code == 2
    assert "tcsh is not one of bash, zsh, fish" in err


def test_defaults_of_a_machine(monkeypatch, base, adapter, tmp_path, run):
    """From variables; the command line wins, and a wrong value names the variable."""
    monkeypatch.setenv("DORA_CONVERT_COMPUTE_DTYPE", "float32")
    words = ("merge", base.path, adapter)
    assert json.loads(run(*words, tmp_path / "a", "--json")[1])["compute_dtype"] == "float32"
    assert (
        json.loads(run(*words, tmp_path / "b", "--json", "--compute-dtype", "float64")[1])["compute_dtype"] == "float64"
    )
    monkeypatch.setenv("DORA_CONVERT_WORKERS", "many")
    code, _, err = run(*words, tmp_path / "c")
    assert code == 2
    assert "DORA_CONVERT_WORKERS" in err
    assert dora_convert.merge(base.path, adapter, tmp_path / "d").compute_dtype == "float64"


def test_env_prints_no_token(monkeypatch, run):
    """Versions, devices and settings, as a table and as JSON."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("DORA_CONVERT_WORKERS", "3")
    assert dora_convert.__version__ in run("env", "-q")[1]
    table, document = run("env")[1], run("env", "--json")[1]
    values = json.loads(document)
    assert values["command"] == "env"
    assert values["packages"]["torch"]
    assert values["variables"]["DORA_CONVERT_WORKERS"] == "3"
    assert "hf_secret" not in table + document


def test_tables_as_values(base, adapter, tmp_path, run):
    """One line a row, cells between tabs, every weight; no sentences."""
    code, out, _ = run("merge", base.path, adapter, tmp_path / "out", "--tsv")
    rows = [line.split("\t") for line in out.splitlines()]
    assert code == 0
    assert rows[0] == ["module", "n", "fate"]
    assert len(rows) > 3
    assert {len(row) for row in rows} == {3}


def test_a_merge_says_what_to_do_next(base, adapter, tmp_path, run):
    """For language models, one line a server, on stderr; nothing for other models, JSON and --quiet."""
    edit_json(base.path / "config.json", architectures=["LlamaForCausalLM"])
    out = tmp_path / "out 1"
    said = run("merge", base.path, adapter, out)[2]
    assert f"vllm serve '{out}'" in said
    assert {"llama.cpp", "MLX", "Ollama"} <= set(said.split())
    for number, option in enumerate(("--json", "-q", "--dry-run")):
        assert "vllm" not in run("merge", base.path, adapter, tmp_path / f"{number}", option)[2]
    edit_json(base.path / "config.json", architectures=["ViTModel"])
    assert "vllm" not in run("merge", base.path, adapter, tmp_path / "vit")[2]


def test_help_starts_no_engine():
    """-h imports neither torch nor rich nor the code of completion."""
    code = (
        "import sys\nfrom dora_convert.cli import main\n"
        "try:\n    main(['merge', '-h'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(str([name for name in ('torch', 'rich', 'tqdm', 'dora_convert.cli.completion') if name in sys.modules] or 0))"
    )
    assert main
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "0"


def test_as_a_command_of_hf(tmp_path):
    """The extension runs the command that is on PATH, and says so if none is."""
    if not (sh := shutil.which("sh")):
        pytest.skip("needs sh")
    extension = Path(__file__).parent.parent / "hf-dora-convert"
    stub = tmp_path / "dora-convert"

    def call(*words):
        found = {"PATH": str(tmp_path)}
        return subprocess.run([sh, extension, *words], env=found, capture_output=True, text=True, check=False)

    missing = call("-h")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "not on PATH" in missing.stderr
    stub.write_text('#!/bin/sh\necho "$#: $1 $2"\nexit 7\n')
    stub.chmod(0o755)
    done = call("merge", "a b")
    assert (done.returncode, done.stdout) == (7, "2: merge a b\n")


def test_the_end_of_a_process_with_torch():
    """The process ends at once, with its exit code, and after what other modules do at the end."""
    code = """
import atexit, sys, types
sys.modules["torch"] = types.ModuleType("torch")
atexit.register(print, "bye")
from dora_convert.cli import run
run()
raise AssertionError
"""
    done = Process(["-c", code, "--version"], os.environ).wait()
    assert (done.returncode, done.stdout.split()[-1]) == (0, "bye"), done.stderr
    done = Process(["-c", code, "merg"], os.environ).wait()
    assert (done.returncode, done.stdout.split()) == (2, ["bye"])
