"""Show progress and pass on notices in Python: a bar of tqdm, and the log `dora_convert`."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger("dora_convert")
PATIENCE = 0.5
"""Seconds before a bar appears: short work needs none."""


def log(text: str) -> None:
    """Log a notice as INFO, and a warning as WARNING, which Python prints on stderr by default.

    The module `warnings` is not used: a filter that turns warnings into errors would stop the work halfway.
    """
    warning = text.removeprefix("warning: ")
    logger.log(logging.INFO if warning == text else logging.WARNING, "%s", warning)


class ProgressBar:
    """The bar of one call; it appears in notebooks and on terminals only. Thread-safe."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._lock = threading.Lock()
        self._off = bool(os.environ.get("TQDM_DISABLE")) or not (in_notebook() or _on_terminal())

    def move(self, done: int, total: int) -> None:
        """Move the bar to the bytes that are done."""
        if self._off:
            return
        with self._lock:
            self._bar = self._bar or _new_bar(total)
            self._bar.total = total
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def _new_bar(total: int) -> tqdm[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without ipywidgets gets the bar of a terminal
        from tqdm.auto import tqdm
    return tqdm(total=total, unit="B", unit_scale=True, delay=PATIENCE)


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def in_notebook() -> bool:
    """Return True in a kernel of Jupyter, where stderr is not a terminal but a bar is welcome."""
    shell = sys.modules.get("IPython")
    found = shell.get_ipython() if shell else None
    return found is not None and "IPKernelApp" in getattr(found, "config", ())
