"""Import torch quickly, and optional packages with a hint if they are missing."""

from __future__ import annotations

import gc
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

from .errors import UsageError

EXTRAS = {"verify": ("transformers", "accelerate", "peft")}
"""The packages of each extra."""


@contextmanager
def without_collections() -> Iterator[None]:
    """Import torch without garbage collection, which takes a third of the time and finds nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with _uninterrupted(), _without_numpy():
            yield
        gc.freeze()  # imported modules never become garbage
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _without_numpy() -> Iterator[None]:
    """Ignore torch's warning that numpy is missing: nothing here needs numpy."""
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    mine = warnings.filters[0]
    try:
        yield
    finally:  # catch_warnings would also drop the filters that the imported packages set
        if mine in warnings.filters:
            warnings.filters.remove(mine)  # type: ignore[attr-defined]


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


def require_extra(extra: str, purpose: str) -> None:
    """Raise UsageError if a package of an extra is missing, with the command that installs it."""
    with without_collections():
        missing = [name for name in EXTRAS[extra] if not _is_installed(name)]
    if missing:
        names = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
        raise UsageError(
            f"{purpose} needs {names}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            hint=f"pip install 'dora-convert[{extra}]'",
        )


def _is_installed(name: str) -> bool:
    """Return True if a package can be imported; a folder of that name is not enough."""
    try:
        if find_spec(name) is None:
            return False
        import_module(name)
    except (ImportError, ValueError):
        return False
    return True
