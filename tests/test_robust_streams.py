"""What reaches a terminal, a pipe or nothing at all: no control characters, no hang, nothing untrue, and no torn words."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert

from .spawner import FORKS, Process
from .test_robust_files import command
from .toy import Base, edit_json, load, make_adapter, make_base

ROOT = Path(__file__).parents[1]
BROKEN = (Path(__file__).parent / "broken_calls.py").read_text()
EVIL = "x\x1b[2J\x1b]0;t\x07\x9b31m\r\x08\u202ey"
"""Clears a screen, names a window, rings, turns red, goes back, and turns the rest around."""
UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


# names that are no text


def clean(*texts):
    for text in texts:
        assert not UNSEEN.search(text), ascii(UNSEEN.findall(text))


@pytest.fixture
def hostile(tmp_path):
    """A base and an adapter whose every name is hostile."""
    base = make_base(tmp_path / "base", shards=1)
    tensors = load_file(base.path / "model.safetensors") | {f"extra.{EVIL}.weight": base.tensors["model.norm.weight"]}
    save_file(tensors, base.path / "model.safetensors", {"format": "pt", EVIL: EVIL})
    (base.path / f"{EVIL}.gguf").touch()
    (base.path / f"{EVIL}.txt").touch()
    edit_json(base.path / "config.json", _name_or_path=EVIL, model_type=EVIL, architectures=[EVIL])
    adapter = make_adapter(
        tmp_path / f"adapter {EVIL}", base, dora=True, base_model_name_or_path=f"org/{EVIL}", revision=EVIL
    )
    return base, adapter


@pytest.mark.parametrize("options", [(), ("--dry-run",), ("-q",), ("-v",)])
def test_merge_prints_no_control_characters(tmp_path, hostile, run, options):
    base, adapter = hostile
    code, out, err = run("merge", base.path, adapter, tmp_path / f"out {EVIL}", *options)
    assert code == 0, err
    clean(err, *([] if "-q" in options else [out]))  # -q: the path itself, for another program


@pytest.mark.parametrize(
    "verb",
    ["inspect base", "inspect adapter", "verify", "unmerge", "push", "from-lora", "to-lora", "extract", "no base"],
)
def test_other_verbs_print_none(tmp_path, hostile, run, verb):
    base, adapter = hostile
    merged = tmp_path / f"merged {EVIL}"
    dora_convert.merge(base.path, adapter, merged)
    words = {
        "inspect base": ["inspect", base.path],
        "inspect adapter": ["inspect", adapter, "--base", base.path, "-v"],
        "verify": ["verify", base.path, adapter, merged],
        "unmerge": ["unmerge", merged, adapter, tmp_path / f"back {EVIL}"],
        "push": ["push", merged, "me/merged", "--dry-run"],
        "from-lora": ["from-lora", base.path, adapter, tmp_path / "new"],
        "to-lora": ["to-lora", base.path, adapter, tmp_path / "new", "--rank", "2"],
        "extract": ["extract", base.path, merged, tmp_path / "new", "--rank", "2"],
        "no base": ["merge", adapter, tmp_path / "new"],
    }[verb]
    _, out, err = run(*words)
    clean(out, err)


@pytest.mark.parametrize(
    "words",
    [
        ["merge", EVIL, EVIL, EVIL], ["inspect", EVIL], [EVIL], ["merge", f"--{EVIL}"], ["inspect", f"org/{EVIL}"],
        ["merge", "a", "b", "c", "--dtype", EVIL], ["push", EVIL, EVIL], ["merge", "a", "b", "c", "--device", EVIL],
        ["merge", "a", "b", "c", "--max-memory", EVIL], ["merge", "--in-place", EVIL, EVIL],
    ],
)  # fmt: skip
def test_words_of_the_command_line(run, words):
    """Scripts pass names on: errors and hints escape them, Click's own, too."""
    code, out, err = run(*words)
    assert code == 2
    clean(out, err)


@pytest.mark.parametrize(
    "change",
    [{EVIL: 1}, {"peft_type": EVIL}, {"init_lora_weights": EVIL}, {"rank_pattern": {f"({EVIL}": 4}}, {"bias": EVIL}],
)
def test_fields_of_an_adapter(tmp_path, base, adapter, run, change):
    edit_json(adapter / "adapter_config.json", **change)
    for words in (["merge", base.path, adapter, tmp_path / "out"], ["inspect", adapter]):
        _, out, err = run(*words)
        clean(out, err)


def test_the_report_page(tmp_path, hostile, run):
    """The page shows names escaped, and holds no control character."""
    base, adapter = hostile
    dora_convert.merge(base.path, adapter, tmp_path / "merged")
    run("verify", base.path, adapter, tmp_path / "merged", "--report", tmp_path / "page.html", "-q")
    clean((tmp_path / "page.html").read_bytes().decode())


def test_the_card(tmp_path, hostile):
    """Nor does the card, which pagers show."""
    base, adapter = hostile
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    clean((tmp_path / "out/README.md").read_text())


def test_notices_of_the_library_are_clean(tmp_path, hostile):
    """on_notice gets what a program prints: escaped, too."""
    base, adapter = hostile
    said = []
    dora_convert.merge(base.path, adapter, tmp_path / "out", on_notice=said.append)
    clean(*said)


# streams that are closed or full


def shell(line, *words, timeout=20):
    """A command with redirections, in a shell."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TQDM_DISABLE", None)  # a bar is drawn where a user has one
    text = line.format(shlex.join([sys.executable, "-m", "dora_convert", *map(str, words)]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(["sh", "-c", text], env=environment, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the shell's children, too
            pytest.fail(f"{line} hangs", pytrace=False)
    return subprocess.CompletedProcess(text, process.returncode, out, err)


@pytest.mark.parametrize(
    ("verb", "line"),
    [
        ("merge", "{} 2>&-"),
        ("merge", "{} >&-"),
        ("merge", "{} <&-"),
        ("merge", "{} <&- >&- 2>&-"),
        ("merge", "{} 2>&- | cat"),
        ("from-lora", "{} 2>&-"),
    ],
)
def test_closed_streams(tmp_path, base, line, verb):
    """Whatever is closed, the work is done and ends; files that are opened are not taken for streams."""
    lora = make_adapter(tmp_path / "lora", base, dora=False)
    done = shell(line, verb, base.path, lora, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    clean(done.stderr)
    if verb == "merge":
        assert load(tmp_path / "out").keys() == base.tensors.keys()
        assert dora_convert.verify(base.path, lora, tmp_path / "out").verdict == "agree"


@pytest.mark.parametrize("options", [(), ("--json",), ("-q",)])
def test_stdout_on_a_full_device(tmp_path, base, adapter, options):
    """OUT is published and the answer cannot be printed: that is said, and nothing else."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has none")
    done = shell("{} >/dev/full", "merge", base.path, adapter, tmp_path / "out", *options)
    assert (tmp_path / "out/config.json").exists()
    assert done.returncode == 2
    assert "Nothing was written" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "stdout" in done.stderr or "standard output" in done.stderr
    assert str(tmp_path / "out") in done.stderr
    if "--json" in options:
        assert "error" in json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("line", ["{} 2>/dev/full", "{} 2>/dev/full >/dev/null"])
def test_stderr_on_a_full_device(tmp_path, base, adapter, line):
    """Notices that cannot be printed are no reason to stop."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has none")
    done = shell(line, "merge", base.path, adapter, tmp_path / "out")
    assert done.returncode == 0
    assert (tmp_path / "out/config.json").exists()


def test_a_reader_that_goes_away(tmp_path, base, adapter):
    """`| head -1` closes the pipe: no traceback, and nothing untrue."""
    done = shell("{} | true", "merge", base.path, adapter, tmp_path / "out", "-v")
    assert "Traceback" not in done.stderr
    assert "Nothing was written" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# words on a screen


@pytest.mark.skipif(not FORKS, reason="needs a process that can be killed at a call")
@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("merge", "{root}/base {root}/dora {root}/out"),
        ("unmerge", "{root}/merged {root}/dora {root}/out"),
        ("from-lora", "{root}/base {root}/lora {root}/out"),
        ("to-lora", "{root}/base {root}/dora {root}/out --rank 2"),
        ("merge", "--in-place {root}/base {root}/dora"),
    ],
)
def test_what_was_resumed_is_said(tmp_path, run, verb, words):
    """Rerunning a killed command says in text that it resumed, and how much was there."""
    base = make_base(tmp_path / "base")
    dora, _ = (make_adapter(tmp_path / name, base, dora=name == "dora") for name in ("dora", "lora"))
    dora_convert.merge(base.path, dora, tmp_path / "merged")
    words = [verb, *words.format(root=tmp_path).split()]
    shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-copy"), dirs_exist_ok=True)
    started = [word.replace(str(tmp_path), str(tmp_path.with_name(f"{tmp_path.name}-copy"))) for word in words]
    told = tmp_path / "calls"
    assert Process(["-c", BROKEN, "kill", "0", str(told), *started], os.environ).wait().returncode == 0
    at = int(told.read_text()) - (40 if "--in-place" in words else 14)
    assert Process(["-c", BROKEN, "kill", str(at), str(told), *words], os.environ).wait().returncode == 9
    code, out, err = run(*words)
    assert code == 0, err
    assert re.search(r"resumed.*\d", (out + err).replace(str(tmp_path), ""))


def test_nothing_is_said_of_what_was_not_resumed(tmp_path, base, adapter, run):
    code, out, err = run("merge", base.path, adapter, tmp_path / "out")
    assert code == 0
    assert "resum" not in (out + err).replace(str(tmp_path), "")


LONG = "model.language_model.layers.0.self_attn.a_rather_long_name_of_a_module_as_some_models_have_them.q_proj"


@pytest.mark.parametrize("words", [["inspect", "{base}", "-v"], ["merge", "{base}", "{adapter}", "{out}", "-v"]])
def test_piped_tables_are_not_folded(tmp_path, words):
    """In a pipe there is no width: each name stands on a line of its own, for grep."""
    (tmp_path / "base").mkdir()
    tensors = {f"{LONG}.weight": torch.randn(8, 8)}
    save_file(tensors, tmp_path / "base/model.safetensors")
    adapter = make_adapter(tmp_path / "adapter", Base(tmp_path / "base", tensors), dora=True, targets=("q_proj",))
    places = {"base": tmp_path / "base", "adapter": adapter, "out": tmp_path / "out"}
    done = command(*(word.format(**places) for word in words), COLUMNS="80")
    assert done.returncode == 0, done.stderr
    if words[0] == "merge":
        assert any(LONG in line for line in done.stdout.splitlines()), done.stdout


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
@pytest.mark.parametrize("width", [40, 60, 80])
def test_sentences_wrap_at_words(tmp_path, base, adapter, width):
    """On a terminal no line is longer than it is wide, and no word is torn that fits."""
    import fcntl
    import struct
    import termios

    main, other = os.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "TERM": "xterm", "NO_COLOR": "1"}
    environment.pop("COLUMNS", None)
    line = [sys.executable, "-m", "dora_convert", "merge", "base", "adapter", "out"]
    with subprocess.Popen(line, stdout=other, stderr=subprocess.PIPE, env=environment, cwd=tmp_path) as process:
        os.close(other)
        shown = b""
        while True:
            try:
                part = os.read(main, 4096)
            except OSError:
                break
            if not part:
                break
            shown += part
        assert process.wait() == 0
    os.close(main)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    lines = text.replace("\r", "").splitlines()
    assert max(map(len, lines)) <= width, lines
    assert "tensors merged" in " ".join(lines) or "merged" in text
    words = set(re.findall(r"[a-z]{4,}", text))
    assert {"exact", "result", "elements", "memory"} <= words


def test_without_numpy(tmp_path, base, adapter):
    """A fresh install prints no warning of torch's: numpy is declared, or that one warning is silenced."""
    declared = re.search(
        r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )[1]
    if '"numpy' in declared:
        return
    for number, options in enumerate(([], ["-q"], ["--json"])):
        done = command(
            "merge",
            base.path,
            adapter,
            tmp_path / f"out{number}",
            *options,
            prelude="import sys; sys.modules['numpy'] = None",
        )
        assert done.returncode == 0, done.stderr
        assert "numpy" not in done.stderr.replace(str(tmp_path), "").lower()


def test_what_is_imported_is_declared():
    """Every package that ours imports is one that installing it brings."""
    text = (ROOT / "pyproject.toml").read_text()
    named = {name.lower().replace("-", "_") for name in re.findall(r'^\s+"([A-Za-z_-]+)[>=\[]', text, re.MULTILINE)}
    extras = {"accelerate", "bitsandbytes", "fsspec", "matplotlib", "peft", "transformers"}
    known = named | extras | {"dora_convert", "yaml"} | set(sys.stdlib_module_names)
    found = set()
    for path in (ROOT / "dora_convert").rglob("*.py"):
        found |= set(re.findall(r"^\s*(?:from|import) ([a-z_]+)", path.read_text(), re.MULTILINE))
    assert not {name for name in found - known if importlib.util.find_spec(name)}


def test_project_urls():
    """Package pages link to the source, the documentation and the issues."""
    text = (ROOT / "pyproject.toml").read_text()
    assert "[project.urls]" in text
    for name in ("Source", "Documentation", "Issues", "Changelog"):
        assert re.search(rf"^{name}\s*=|^\"?{name}", text, re.MULTILINE), name


def test_the_first_command_of_the_readme():
    """Until there is a release, installing is from the repository."""
    first = re.search(r"^\$? *(.*pip install .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert first
    assert "git+https://" in first[1] or " -e " in first[1] or " ." in first[1]
