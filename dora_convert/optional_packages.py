"""Packages that only some verbs need: whether they are there, and the command that brings them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from .errors import UsageError
from .lazy_torch import without_collections

EXTRAS = {"verify": ("transformers", "accelerate", "peft")}
"""What each extra of this package brings."""


def need(extra: str, what: str) -> None:
    """Refuse to begin where a package of an extra is missing; `what` is what it is needed for.

    Raises UsageError with the command to type.
    """
    with without_collections():
        missing = [name for name in EXTRAS[extra] if not _is_there(name)]
    if missing:
        raise UsageError(
            f"{what} needs {_listed(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            hint=f"pip install 'dora-convert[{extra}]'",
        )


def _is_there(name: str) -> bool:
    """Whether a package can be imported: a folder of that name is not enough."""
    try:
        if find_spec(name) is None:
            return False
        import_module(name)
    except (ImportError, ValueError):
        return False
    return True


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
