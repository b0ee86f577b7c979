"""A command's own process imports torch without the packages that it does not use, and gives them to who asks."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from dora_convert import deferred_imports, torch_import
from dora_convert.deferred_imports import TRIED, Deferring
from dora_convert.torch_import import without_collections

from .test_torch_import import ROOT, python
from .toy import make_adapter, make_base

tried = pytest.mark.skipif(deferred_imports._minor_version() not in TRIED, reason="this torch is imported plainly")

BEGIN = """
import inspect, pickle, sys, threading, warnings
from dora_convert import deferred_imports, torch_import
torch_import.own_process[0] = True
with torch_import.without_collections(numpy=False):
    import torch
[deferring] = [each for each in sys.meta_path if isinstance(each, deferred_imports.Deferring)]
waiting = lambda: {module.__name__ for module in deferring.waiting}
assert waiting() == deferred_imports.DEFERRED
assert not {"torch._decomp", "torch._refs", "torch._prims"} & set(sys.modules)
"""
LOOKS = """
modules = [sys.modules[name] for name in deferred_imports.DEFERRED]
for module in modules:
    assert module.__file__.endswith(".py") and module.__spec__.loader is module.__loader__
    assert inspect.getsourcefile(module) == module.__file__ and inspect.getmodule(module) is module
    assert not hasattr(module, "__warningregistry__") and not hasattr(module, "__wrapped__") and repr(module)
    assert isinstance(module, type(sys)) and not isinstance(module, int)
inspect.getmodule(waiting), inspect.stack()
warnings.warn("a warning")
pickle.dumps(torch.float32), pickle.dumps(torch.ones(2))
import email.mime.audio
numbers = torch.randn(4, generator=deferred_imports.seeded(3))
from torch import export, nested
import torch.export
assert waiting() == deferred_imports.DEFERRED
"""
WORKS = """
class Double(torch.nn.Module):
    def forward(self, x):
        return torch.softmax(2 * x, -1)

assert torch.equal(numbers, torch.randn(4, generator=torch.Generator().manual_seed(3)))
assert torch.export.export(Double(), (torch.ones(3),)).module()(torch.ones(3)).sum() == 1
"""
USES = {
    "below": "import torch.export.unflatten",
    "circle": "import torch.utils._content_store as store; assert store is sys.modules[store.__name__]; store.ContentStoreReader",
    "lacking": "assert not hasattr(torch, 'no_such') and waiting(); assert torch.broadcast_shapes((2, 1), (3,)) == (2, 3)",
}
MERGE = """
import atexit, sys
from dora_convert.cli import run
from dora_convert.deferred_imports import DEFERRED
waiting = lambda: sorted(module.__name__ for each in sys.meta_path for module in getattr(each, "waiting", ()))
atexit.register(lambda: print(waiting() == sorted(DEFERRED)))
sys.argv[1:1] = ["merge", "--quiet"]
run()
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package like torch, two of whose parts are deferred; they write down when they are executed."""
    top = tmp_path / "parts"
    top.mkdir()
    (top / "__init__.py").write_text("done = []\nfrom . import a, b")
    for name, other in ("ab", "ba"):
        (top / f"{name}.py").write_text(
            f"import parts\nfrom parts import {other}\nx = 1\nparts.done.append('{name}')\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(deferred_imports, "DEFERRED", frozenset({"parts.a", "parts.b"}))
    deferring = Deferring()
    monkeypatch.setattr(sys, "meta_path", [deferring, *sys.meta_path])
    import parts

    deferring.imported = True
    yield parts
    for name in [name for name in sys.modules if name.split(".")[0] == "parts"]:
        del sys.modules[name]


def test_modules_wait_for_their_first_name(package):
    """The first name that is missing executes all that wait, in the order of the imports."""
    assert package.done == []
    assert package.b.x == 1
    assert package.done == ["a", "b"]
    assert type(package.a) is type(package.b) is ModuleType


def test_a_part_that_another_needs_is_executed_in_between(package, tmp_path):
    """As if it had not waited: the first one's code gets the second one's names."""
    (tmp_path / "parts/a.py").write_text(
        "import parts\nfrom parts import b\nassert b.x\nx = 1\nparts.done.append('a')\n"
    )
    assert package.a.x == 1
    assert package.done == ["b", "a"]


@pytest.mark.parametrize("fault", ["raise AttributeError('no library')", "import no_such_module", "x ="])
def test_an_error_of_a_deferred_import_is_told(package, tmp_path, fault):
    """Each use of a name tells it, `hasattr` too; once the fault is mended, the module works."""
    good = (tmp_path / "parts/a.py").read_text()
    (tmp_path / "parts/a.py").write_text(fault)
    for _ in range(2):
        with pytest.raises(ImportError, match=r"^parts\.a cannot be imported: "):
            hasattr(package.b, "x")
    (tmp_path / "parts/a.py").write_text(good)
    assert package.b.x == 1


def test_an_interruption_passes(package, tmp_path):
    """Ctrl-C is no error of the import, and the module waits again."""
    (tmp_path / "parts/a.py").write_text(
        "import parts\nif not parts.done:\n    parts.done.append(0)\n    raise KeyboardInterrupt\n"
    )
    with pytest.raises(KeyboardInterrupt):
        _ = package.b.x
    assert package.b.x == 1


@tried
def test_what_looks_at_all_modules_executes_nothing_and_threads_may_use_them(tmp_path):
    """Then several threads use the modules first, each gets its name, and torch.export works."""
    threads = """
names = []
threads = [threading.Thread(target=lambda: names.append(torch.export.Dim)) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert len(set(names)) == 1 and len(names) == 4 and not waiting()
"""
    done = python(BEGIN + LOOKS + threads + WORKS)
    assert done.returncode == 0, done.stderr


@tried
@pytest.mark.parametrize("use", USES)
def test_any_use_executes_them(use):
    """As they are executed for a module below one of them, and for another module of torch, which may expect them."""
    done = python(BEGIN + USES[use] + "\nassert not waiting()")
    assert done.returncode == 0, done.stderr


@tried
def test_a_merge_executes_none_of_them(tmp_path):
    """A DoRA's merge, its self-check and its record do without them."""
    base = make_base(tmp_path / "base")
    done = python(MERGE, base.path, make_adapter(tmp_path / "adapter", base, dora=True), tmp_path / "out")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "True"), done.stderr


@tried
def test_every_verb_runs_in_a_process_of_its_own(tmp_path):
    """Other tests fork processes that have torch already. These import it as a user's command does."""
    base = make_base(tmp_path / "base")
    dora = make_adapter(tmp_path / "dora", base, dora=True)
    lora = make_adapter(tmp_path / "lora", base, dora=False)
    out, base = tmp_path / "out", base.path
    commands = [
        ("merge", base, dora, out), ("verify", base, dora, out), ("unmerge", out, dora, tmp_path / "back"),
        ("from-lora", base, lora, tmp_path / "made"), ("to-lora", base, dora, tmp_path / "small", "--rank", "2"),
        ("to-lora", base, dora, lora, tmp_path / "one", "--rank", "3"), ("analyze", base, dora),
        ("extract", base, out, tmp_path / "found", "--rank", "2", "--kind", "dora"), ("inspect", dora),
        ("merge", base, dora, lora, tmp_path / "both", "--method", "dare-ties", "--density", "0.5"),
    ]  # fmt: skip
    for words in commands:
        command = [sys.executable, "-m", "dora_convert", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, (words[0], done.stderr)


def test_random_numbers_come_from_one_place():
    """torch makes no generator while packages wait, so all are made by `seeded`."""
    sources = {path: path.read_text() for path in (ROOT / "dora_convert").rglob("*.py")}
    named = [path.name for path, text in sources.items() if "torch.Generator" in text or "torch.seed(" in text]
    assert named == ["deferred_imports.py"]


@pytest.mark.parametrize(
    ("text", "minor"),
    [
        ("__all__ = ['debug']\n__version__ = '2.13.0+cpu'\ndebug = False\n", "2.13"),
        ('__version__ = "2.11.1"\n', "2.11"),
        ("__version__ = '2.14.0a0+git1234'\n", None),
        ("__version__ = '2.14.0.dev20260801+cpu'\n", None),
        ("", None),
        (None, None),
    ],
)
def test_releases_are_told_from_other_builds(tmp_path, monkeypatch, text, minor):
    """The version is read from torch's own file; a build between two releases is none."""
    if text is not None:
        (tmp_path / "version.py").write_text(text)
    spec = ModuleSpec("torch", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(deferred_imports, "find_spec", lambda _: spec)
    assert deferred_imports._minor_version() == minor


def test_other_versions_and_other_processes_import_torch_plainly(monkeypatch):
    """Only in a command's own process, and only for versions on which it was tried, are packages deferred."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    before = list(sys.meta_path)
    for own, numpy, minor in ((False, False, "2.13"), (True, True, "2.13"), (True, False, "2.10"), (True, False, None)):
        monkeypatch.setattr(deferred_imports, "_minor_version", lambda minor=minor: minor)
        monkeypatch.setattr(torch_import, "own_process", [own])
        with without_collections(numpy=numpy):
            assert sys.meta_path == before
    assert "2.10" not in TRIED
