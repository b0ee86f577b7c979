"""Importing what computes, which takes a second or two, only when a verb needs it."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Import without garbage collections: importing torch makes no garbage, and looking for some takes a third of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with _uninterrupted():
            yield
        gc.freeze()  # nor will there be any among it later
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back: in the middle of importing torch it is lost, or ends the process without a word."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
