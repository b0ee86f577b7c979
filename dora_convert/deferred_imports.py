"""Import torch without the packages that a command does not use, and execute these once anything asks for them."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader

    from torch import Generator
else:
    Loader = object  # importlib.abc takes a hundredth of a second

DEFERRED = frozenset({"torch.export", "torch.nested", "torch._meta_registrations"})
"""Packages that torch imports, and that no operation on real tensors uses: with those that they import, a third of
Python's time."""
TRIED = frozenset({"2.11", "2.12", "2.13", "2.14"})
"""Versions of torch that were imported without these packages, used, and then given them."""
VERSION = re.compile(r"""^__version__ = ['"](\d+\.\d+)\.\d+(?:\+\w+)?['"]""", re.MULTILINE)
"""A release in torch's version.py, with its minor version."""


def torch_files(name: str) -> list[str]:
    """Return the paths of a file in torch's folder, of which there is one at most, without importing torch."""
    spec = find_spec("torch")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return [os.path.join(folder, name) for folder in folders]  # noqa: PTH118 - pathlib is not imported yet


def seeded(seed: int) -> Generator:
    """Return a new generator of random numbers on the processor.

    While packages wait, torch makes none before `torch._prims` is imported, but copies its own, which is of that kind.
    """
    import torch

    waits = any(isinstance(finder, Deferring) and finder.waiting for finder in sys.meta_path)
    generator = torch.default_generator.clone_state() if waits else torch.Generator()
    return generator.manual_seed(seed)


@contextmanager
def deferring(*, used: bool) -> Iterator[None]:
    """Import torch without executing the packages of `DEFERRED`, if it is a version on which this was tried."""
    if not used or "torch" in sys.modules or _minor_version() not in TRIED:
        yield
        return
    finder = Deferring()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        finder.imported = True
        if finder.waiting and "torch" in sys.modules:
            finder.watch(sys.modules["torch"])


def _minor_version() -> str | None:
    """Return the minor version of a released torch, such as 2.13, without importing it; None if it is no release."""
    with suppress(ImportError, OSError, ValueError):
        for path in torch_files("version.py"):
            with open(path, encoding="utf-8") as file:  # noqa: PTH123
                match = VERSION.search(file.read())
            return match[1] if match else None
    return None


class Deferring:
    """Finds packages that are executed later: when one is used, or when anything imports more of torch.

    For torch's own modules import each other in circles, and may expect what any of these packages registers.
    """

    def __init__(self) -> None:
        """Find packages that wait until torch is `imported`, and then those that have them wait no longer."""
        self.imported = False
        self.waiting: list[Deferred] = []
        self._executing = False
        self._lock = threading.RLock()

    def find_spec(self, name: str, path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a package that is deferred; None for all others."""
        if self.imported:
            return self._find_late(name)
        spec = PathFinder.find_spec(name, path) if name in DEFERRED else None
        if spec and spec.loader:
            spec.loader = Later(self, spec.loader)
        return spec

    def _find_late(self, name: str) -> ModuleSpec | None:
        """Execute what waits before another module of torch; return its spec if it was imported by that."""
        if not self.waiting or not name.startswith("torch."):
            return None
        self.execute()
        return ModuleSpec(name, Present(sys.modules[name])) if name in sys.modules else None

    def watch(self, torch: ModuleType) -> None:
        """Execute what waits before torch lacks one of its own modules, as `torch._refs`, which that imports."""
        usual = torch.__getattr__

        def find(name: str) -> Any:
            if self.waiting and name.startswith("_") and not name.startswith("__"):
                self.execute()
                if name in vars(torch):
                    return vars(torch)[name]
            return usual(name)

        torch.__getattr__ = find  # type: ignore[method-assign] # Python calls it for names that a module lacks

    def execute(self, needed: Deferred | None = None) -> None:
        """Execute all that wait in the order of torch's import; in the middle of that, only the one that is needed."""
        with self._lock:
            inside, self._executing = self._executing, True
            try:
                for module in [needed] if inside else [*self.waiting]:
                    if module in self.waiting:
                        self._execute(module)
            finally:
                self._executing = inside

    def _execute(self, module: Deferred) -> None:
        """Execute a module; ImportError if that fails, and again at the next use."""
        self.waiting.remove(module)
        try:
            module.__loader__.exec_module(module)
        except BaseException as error:
            self.waiting.insert(0, module)
            if not isinstance(error, Exception):
                raise
            # an AttributeError would pass for a missing name
            raise ImportError(f"{module.__name__} cannot be imported: {error}", name=module.__name__) from error
        module.__class__ = ModuleType  # type: ignore[assignment] # which is how a module changes its kind


class Later(Loader):
    """Makes a module that another loader executes later."""

    def __init__(self, deferring: Deferring, loader: Loader) -> None:
        """Defer the work of a loader."""
        self._deferring, self._loader = deferring, loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return a module without names of its own."""
        return Deferred(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Have the module wait, with its own loader."""
        assert isinstance(module, Deferred)
        assert module.__spec__
        module.__spec__.loader = module.__loader__ = self._loader
        module.__deferring__ = self._deferring
        self._deferring.waiting.append(module)


class Present(Loader):
    """Returns a module that was imported while its spec was looked for."""

    def __init__(self, module: ModuleType) -> None:
        """Keep the module, and its own spec."""
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:  # noqa: ARG002
        """Return the module."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Execute nothing: give the module its own spec again."""
        module.__spec__ = self._spec


class Deferred(ModuleType):
    """A module that is executed at the first use of a name that it lacks; then it is a plain module.

    What looks at all modules, as `inspect` and `warnings` do, asks for names with underscores on both sides, and gets
    those of the module's file.
    """

    __deferring__: Deferring
    __loader__: Loader

    def __getattr__(self, name: str) -> Any:
        """Execute this module and the others that wait, and return the attribute."""
        if not name.startswith("__"):
            self.__deferring__.execute(self)
            if type(self) is ModuleType:
                return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
