"""Run functions of tensors without the interpreter's lock, so that several threads compute at once.

torch gives the lock away and takes it back at each of its calls. A function that TorchScript compiled does so once, for
all its operations. They are the same operations in the same order, and give the same bytes.

TorchScript is deprecated, and still part of every torch that this package runs with. If it is missing, or refuses a
function, the function runs as Python.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Scripted(Generic[Arguments, Result]):
    """A function of tensors that is compiled when it is first called; a decorator."""

    def __init__(self, plain: Callable[Arguments, Result]) -> None:
        """`plain` is written in the part of Python that TorchScript knows."""
        self.plain = plain
        self._compiled: Callable[Arguments, Result] | None = None
        self._compiling = threading.Lock()

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Call the compiled function, or the plain one."""
        return (self._compiled or self._compile())(*args, **kwargs)

    def _compile(self) -> Callable[Arguments, Result]:
        with self._compiling:
            if self._compiled is None:
                self._compiled = _script(self.plain) or self.plain
        return self._compiled

    @property
    def compiles(self) -> bool:
        """True if torch compiles the function."""
        return self._compile() is not self.plain


def _script(function: Callable[Arguments, Result]) -> Callable[Arguments, Result] | None:
    """Return a compiled function; None if torch cannot compile it.

    It runs as it is written. torch would look at its first calls to make it faster: a tenth of a second, and no gain.
    """
    from torch import jit

    warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
    mine = warnings.filters[0]
    try:
        compiled: Callable[Arguments, Result] = jit.script(function)
    except Exception:  # noqa: BLE001 - TorchScript raises errors of many kinds, also for a source that is missing
        return None
    finally:  # catch_warnings would also drop the filters that other threads set
        if mine in warnings.filters:
            warnings.filters.remove(mine)  # type: ignore[attr-defined]

    def as_written(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jit.optimized_execution(should_optimize=False):  # type: ignore[attr-defined] # a setting of this thread
            return compiled(*args, **kwargs)

    return as_written
