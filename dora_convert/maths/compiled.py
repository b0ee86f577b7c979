"""Run functions of tensors without Python's lock: torch compiles them from their source.

Threads wait for each other's lock at every call of torch from Python. A compiled function calls torch with the lock
released, and does the same operations. Where torch cannot compile, the functions run as they are.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

Function = Callable[..., Any]


class CompiledFunctions:
    """Functions that call each other, compiled together when the first is needed."""

    def __init__(self, functions: Sequence[Function]) -> None:
        """Those that are called come after those that they call."""
        self.plain = {function.__name__: function for function in functions}
        self._compiled: dict[str, Function] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Function:
        """Return a function by its name."""
        with self._lock:
            if not self._compiled:
                self._compiled = compiled(self.plain)
        return self._compiled[name]


def compiled(functions: dict[str, Function]) -> dict[str, Function]:
    """Return the same functions, compiled; as they are if torch cannot do it or their source is not there."""
    try:
        source = "\n\n".join(inspect.getsource(function) for function in functions.values())
        unit = torch.jit.CompilationUnit(source)
        return {name: getattr(unit, name) for name in functions}
    except (AttributeError, OSError, RuntimeError, TypeError):
        return functions
