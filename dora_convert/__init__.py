"""Move between base + adapter and checkpoint: LoRA and DoRA, streaming, exact.

    >>> import dora_convert
    >>> report = dora_convert.merge("org/base", "org/adapter", "merged")  # doctest: +SKIP

The functions here are the verbs of the command line. torch is imported when one runs, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .errors import (
        DoraConvertError,
        HubError,
        MalformedError,
        NumericalError,
        OutputError,
        PlanError,
        RefError,
        UnsupportedError,
        UsageError,
        VerificationError,
    )
    from .inspected import AdapterReport, CheckpointReport
    from .operations import inspect, merge, verify
    from .report import DryRunReport, MergeReport
    from .verified import VerifyReport

__all__ = [
    "AdapterReport",
    "CheckpointReport",
    "DoraConvertError",
    "DryRunReport",
    "HubError",
    "MalformedError",
    "MergeReport",
    "NumericalError",
    "OutputError",
    "PlanError",
    "RefError",
    "UnsupportedError",
    "UsageError",
    "VerificationError",
    "VerifyReport",
    "__version__",
    "inspect",
    "merge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import errors, inspected, operations, report, verified

    for module in (errors, operations, report, inspected, verified):
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(name)  # pragma: no cover - __all__ is tested
