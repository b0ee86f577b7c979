"""Import torch in the least time: its libraries ahead, and without what nothing here needs.

A thread loads the libraries while a command imports its own modules and makes its plan. The system's loader takes a
sixth of a second for them, and needs no interpreter. Other compiled modules wait for the loader meanwhile, so those
that a merge needs are imported first.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module

from .deferred_imports import deferring, torch_files

LIBRARY = "lib/libtorch_python.so"
"""The library in torch's folder that needs all the others."""
VERBS = frozenset({"merge", "unmerge", "from-lora", "to-lora", "extract", "verify", "analyze"})
"""Verbs that compute."""
BRIEF = frozenset({"--help", "-h", "--dry-run"})
"""Options of commands that need no torch."""
COMPILED = (
    "array", "base64", "contextvars", "ctypes", "datetime", "decimal", "fcntl", "grp", "hashlib", "heapq", "json",
    "math", "msgspec", "pickle", "random", "resource", "shutil", "statistics", "subprocess", "typing", "uuid",
    "xxhash",
)  # fmt: skip
"""Modules that a merge imports before torch, and that are compiled or import one that is."""
PLUGINS = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""torch's own variable: 0 leaves alone the plug-ins of devices that are neither a processor nor CUDA nor MPS."""
own_process = [False]
"""True if no other code runs in this process: it is a command's."""
frozen_by_others = [False]
"""True once objects were found frozen in a process that is not a command's own."""
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
    if not has_folder():
        return
    for name in COMPILED:
        with suppress(ImportError):
            import_module(name)
    begun[0] = True
    threading.Thread(target=_load, name="ahead", daemon=True).start()


def has_folder() -> bool:
    """Return True if this process's current folder exists: without one, torch's MKL ends the process."""
    try:
        os.getcwd()  # noqa: PTH109 - pathlib is not imported yet
    except OSError:
        return False
    return True


def _load() -> None:
    """Load the library as its import does: its symbols are for itself.

    The loader is called as a function of the C library: `ctypes.CDLL` would hold the interpreter.
    """
    with suppress(AttributeError, ImportError, OSError, ValueError):
        import ctypes

        for path in torch_files(LIBRARY):
            ctypes.CDLL(None).dlopen(path.encode(), os.RTLD_NOW | os.RTLD_LOCAL)


@contextmanager
def collections_paused() -> Iterator[None]:
    """Build many objects that all stay without garbage collections, which would look at each again and again.

    Afterwards the objects count as old, or the next collection would look at all of them at once.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            _grow_old()
            gc.enable()


def _grow_old() -> None:
    """Have no collection of young objects look at those that there are now.

    In a command's own process no collection does. Elsewhere they may become garbage, and a program that has frozen its
    objects keeps them so: all would thaw with ours. Frozen objects are counted one by one, so once is enough.
    """
    if own_process[0]:
        gc.freeze()
        return
    frozen_by_others[0] = frozen_by_others[0] or gc.get_freeze_count() > 0
    if not frozen_by_others[0]:
        gc.freeze()
        gc.unfreeze()


@contextmanager
def without_collections(*, numpy: bool = True) -> Iterator[None]:
    """Import torch without garbage collection, which takes a third of the time and finds nothing.

    torch's warning that NumPy is missing is of no use. Without `numpy`, a process of our own saves a third of a second:
    NumPy is hidden, torch does not look for plug-ins of other devices, and packages of no use here wait for one.
    """
    bare = not numpy and own_process[0]
    with (
        collections_paused(),
        _uninterrupted(),
        _without_numpy(hidden=bare),
        _without_plugins(skipped=bare),
        deferring(used=bare),
    ):
        yield


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
