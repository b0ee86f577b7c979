"""torch's libraries are loaded beside a command's own imports, and what goes wrong there changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from dora_convert import deferred_imports, torch_import

from .spawner import Process
from .toy import make_adapter, make_base

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is loaded ahead")

LATE = """
import os, sys
from importlib.machinery import ExtensionFileLoader
from dora_convert import torch_import
torch_import._load = lambda: None
torch_import.load_torch(["merge"])
assert torch_import.begun[0]
import filelock  # for Python 3.10, it imports asyncio and all that this needs
before = set(sys.modules)

class AtTorch:
    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        compiled = [m for m, of in list(sys.modules.items()) if isinstance(getattr(of, "__loader__", None), ExtensionFileLoader)]
        print(*sorted(set(compiled) - before), flush=True)
        os._exit(0)

sys.meta_path.insert(0, AtTorch())
sys.argv[1:1] = ["merge", "--quiet"]
from dora_convert.cli import run
run()
"""
LOADED = """
import sys, threading
from dora_convert import torch_import
torch_import.load_torch(["merge", "a", "b", "c"])
[thread.join() for thread in threading.enumerate() if thread.name == "ahead"]
maps = open("/proc/self/maps").read()
assert "libtorch_python" in maps and "torch" not in sys.modules and "dora_convert.settings" not in sys.modules
import torch
assert torch.ones(2).sum() == 2
"""
CLOSED = """
import os, sys
from dora_convert import __main__

__main__.load_torch = lambda words: print(*(os.readlink(f"/proc/self/fd/{number}") for number in (0, 2)))
sys.argv[1:] = ["--version"]
__main__.run()
"""
GARBAGE = """
import gc, sys, weakref
import dora_convert

class Ring:
    def __init__(self):
        self.me = self

gc.unfreeze()
if sys.argv[4] == "frozen":
    gc.freeze()
rings = [Ring()]
dora_convert.merge(*sys.argv[1:4])
seen = weakref.ref(rings.pop())
gc.collect()
assert seen() is None
if sys.version_info[:2] != (3, 12):  # which freezes immortal objects itself
    assert bool(gc.get_freeze_count()) == (sys.argv[4] == "frozen")
"""


def python(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@linux
def test_no_compiled_module_waits_for_the_loader(tmp_path):
    """Whatever a DoRA's merge imports before torch and is compiled was imported before the thread began."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    done = python(LATE, base.path, adapter, tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


@linux
def test_closed_streams_are_opened_before_the_loader_opens_files():
    """Else a library that is being loaded may be taken for stderr: a merge hung or crashed once in a hundred times."""
    command = ["sh", "-c", 'exec "$0" -c "$1" 0<&- 2>&-', sys.executable, CLOSED]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["/dev/null", "/dev/null"])


@linux
def test_the_libraries_are_loaded_and_torch_is_not_imported():
    """Afterwards the import of torch finds them, and works."""
    done = python(LOADED)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [[], ["inspect", "a"], ["merge", "a", "b", "c", "--dry-run"], ["verify", "--help"]])
def test_commands_without_torch_load_nothing(words, monkeypatch):
    """Commands that compute nothing begin no thread."""
    monkeypatch.setattr(torch_import.threading, "Thread", lambda **_: pytest.fail("a thread was begun"))
    monkeypatch.setattr(torch_import, "begun", [False])
    torch_import.load_torch(words)
    assert not torch_import.begun[0]


@linux
@pytest.mark.parametrize("content", [None, b"no library"])
def test_a_missing_or_broken_library_is_left_to_the_import(tmp_path, monkeypatch, content):
    """The thread says nothing: torch's own import tells what is wrong with it."""
    if content:
        (tmp_path / "lib").mkdir()
        (tmp_path / torch_import.LIBRARY).write_bytes(content)
    spec = ModuleSpec("torch", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(deferred_imports, "find_spec", lambda _: spec)
    torch_import._load()
    monkeypatch.setattr(deferred_imports, "find_spec", lambda _: None)
    torch_import._load()


@pytest.mark.parametrize("objects", ["", "frozen"])
def test_the_garbage_of_a_program_is_found(tmp_path, base, adapter, objects):
    """A merge in a program's own process freezes none of its objects, and keeps those frozen that are."""
    words = [base.path, adapter, tmp_path / "out", objects]
    done = Process(["-c", GARBAGE, *map(str, words)], os.environ).wait()
    assert done.returncode == 0, done.stderr


def test_an_error_is_told_while_libraries_are_loaded(tmp_path):
    """A command that fails at once ends with its own message and exit code."""
    words = [sys.executable, "-m", "dora_convert", "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: 2 inputs cannot be read.")
