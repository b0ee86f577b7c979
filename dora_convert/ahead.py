"""Load torch's libraries in a thread while a command imports its own modules and makes its plan.

The system's loader takes a sixth of a second for them on one processor, and needs no interpreter. Other compiled
modules wait for it meanwhile, so the few that every merge needs are imported first.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec

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

        spec = find_spec("torch")
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            path = os.path.join(folder, LIBRARY)  # noqa: PTH118 - pathlib is not imported yet
            ctypes.CDLL(None).dlopen(path.encode(), os.RTLD_NOW | os.RTLD_LOCAL)
