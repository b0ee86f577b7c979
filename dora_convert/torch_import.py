"""Import torch in the least time: its libraries ahead, and without what nothing here needs.

A thread loads the libraries while a command imports its own modules and makes its plan. The system's loader takes a
sixth of a second for them, and needs no interpreter. Other compiled modules wait for the loader meanwhile, so those
that a merge needs are imported first.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader
else:
    Loader = object  # importlib.abc takes a hundredth of a second

LIBRARY = "lib/libtorch_python.so"
"""The library in torch's folder that needs all the others."""
VERBS = frozenset({"merge", "unmerge", "from-lora", "to-lora", "extract", "verify", "analyze"})
"""Verbs that compute."""
BRIEF = frozenset({"--help", "-h", "--dry-run"})
"""Options of commands that need no torch."""
COMPILED = (
    "array", "base64", "contextvars", "ctypes", "datetime", "decimal", "fcntl", "hashlib", "heapq", "json", "math",
    "msgspec", "pickle", "random", "resource", "shutil", "statistics", "subprocess", "typing", "uuid", "xxhash",
)  # fmt: skip
"""Modules that a merge imports before torch, and that are compiled or import one that is."""
DEFERRED = frozenset({"torch.export", "torch.nested", "torch._meta_registrations"})
"""Packages that torch imports, and that no operation on real tensors uses: with those that they import, a third of
Python's time."""
TRIED = frozenset({"2.11", "2.12", "2.13", "2.14"})
"""Versions of torch that were imported without these packages, used, and then given them."""
VERSION = re.compile(r"""^__version__ = ['"](\d+\.\d+)\.\d+(?:\+\w+)?['"]""", re.MULTILINE)
"""A release in torch's version.py, with its minor version."""
PLUGINS = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""torch's own variable: 0 leaves alone the plug-ins of devices that are neither a processor nor CUDA nor MPS."""
own_process = [False]
"""True if no other code runs in this process: it is a command's."""
ends_at_once = [False]
"""True once this process ends without taking itself apart."""
begun = [False]
"""True if this process has begun to load torch's libraries."""


def load_torch(words: Sequence[str]) -> None:
    """Begin to load torch's libraries if a command line is of a verb that computes.

    Nothing is imported: the import of torch finds its libraries loaded, or loads them, and tells what is wrong.
    """
    if sys.platform != "linux" or not VERBS.intersection(words[:1]) or BRIEF.intersection(words):
        return
    for name in COMPILED:
        with suppress(ImportError):
            import_module(name)
    begun[0] = True
    threading.Thread(target=_load, name="ahead", daemon=True).start()


def _load() -> None:
    """Load the library as its import does: its symbols are for itself.

    The loader is called as a function of the C library: `ctypes.CDLL` would hold the interpreter.
    """
    with suppress(AttributeError, ImportError, OSError, ValueError):
        import ctypes

        for path in _files(LIBRARY):
            ctypes.CDLL(None).dlopen(path.encode(), os.RTLD_NOW | os.RTLD_LOCAL)


def _files(name: str) -> list[str]:
    """Return the paths of a file in torch's folder, of which there is one at most, without importing torch."""
    spec = find_spec("torch")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return [os.path.join(folder, name) for folder in folders]  # noqa: PTH118 - pathlib is not imported yet


@contextmanager
def collections_paused() -> Iterator[None]:
    """Build many objects that all stay without garbage collections, which would look at each again and again.

    Afterwards the objects count as old, or the next collection would look at all of them at once.
    """
    enabled = gc.isenabled()
    stay = own_process[0] or gc.get_freeze_count() > 0  # they are counted one by one
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            if not stay:
                gc.unfreeze()
            gc.enable()


@contextmanager
def without_collections(*, numpy: bool = True) -> Iterator[None]:
    """Import torch without garbage collection, which takes a third of the time and finds nothing.

    torch's warning that NumPy is missing is of no use. Without `numpy`, a process of our own saves a third of a second:
    NumPy is hidden, torch does not look for plug-ins of other devices, and packages of no use here wait for one.
    """
    bare = not numpy and own_process[0]
    with collections_paused():
        with _uninterrupted(), _without_numpy(hidden=bare), _without_plugins(skipped=bare), _deferring(used=bare):
            yield
        gc.freeze()  # imported modules never become garbage


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back: in the middle of importing torch it is lost, or ends the process without a word."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    caught: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def _without_numpy(*, hidden: bool) -> Iterator[None]:
    """Ignore torch's warning that numpy is missing: nothing here needs numpy; torch does not find it if `hidden`."""
    if hidden := hidden and "numpy" not in sys.modules:
        sys.modules["numpy"] = None  # type: ignore[assignment] # as Python has it for what cannot be imported
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    mine = warnings.filters[0]
    try:
        yield
    finally:  # catch_warnings would also drop the filters that the imported packages set
        if hidden:
            del sys.modules["numpy"]
        if mine in warnings.filters:
            warnings.filters.remove(mine)  # type: ignore[attr-defined]


@contextmanager
def _without_plugins(*, skipped: bool) -> Iterator[None]:
    """Tell torch not to look for plug-ins of devices, among all installed packages, unless the user decides it."""
    if not skipped or PLUGINS in os.environ:
        yield
        return
    os.environ[PLUGINS] = "0"
    try:
        yield
    finally:
        del os.environ[PLUGINS]


@contextmanager
def _deferring(*, used: bool) -> Iterator[None]:
    """Import torch without executing the packages of `DEFERRED`, if it is a version on which this was tried."""
    if not used or "torch" in sys.modules or _minor_version() not in TRIED:
        yield
        return
    deferring = Deferring()
    sys.meta_path.insert(0, deferring)
    try:
        yield
    finally:
        deferring.imported = True


def _minor_version() -> str | None:
    """Return the minor version of a released torch, such as 2.13, without importing it; None if it is no release."""
    with suppress(ImportError, OSError, ValueError):
        for path in _files("version.py"):
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
