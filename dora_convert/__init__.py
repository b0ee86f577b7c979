"""Move between base + adapter and checkpoint: LoRA and DoRA, streaming, exact.

    >>> import dora_convert
    >>> report = dora_convert.merge("org/base", "org/adapter", "merged")  # doctest: +SKIP

The functions here are the verbs of the command line. torch is imported when one runs, not before.
"""

from __future__ import annotations

from importlib import import_module
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
    from .fitting.report import MadeDryRun, MadeReport
    from .reports.inspect import AdapterReport, CheckpointReport
    from .reports.merge import DryRunReport, MergeReport, PushReport, Recovered, UnmergeReport
    from .reports.verify import OutputsReport, VerifyReport
    from .verbs.extract import extract
    from .verbs.from_lora import from_lora
    from .verbs.inspect.verb import inspect
    from .verbs.merge import merge
    from .verbs.push import push
    from .verbs.to_lora import to_lora
    from .verbs.unmerge import unmerge
    from .verbs.verify import verify

_MODULES = {
    "errors": (
        "DoraConvertError", "HubError", "MalformedError", "NumericalError", "OutputError", "PlanError", "RefError",
        "UnsupportedError", "UsageError", "VerificationError",
    ),
    "reports.inspect": ("AdapterReport", "CheckpointReport"),
    "fitting.report": ("MadeDryRun", "MadeReport"),
    "reports.merge": ("DryRunReport", "MergeReport", "PushReport", "Recovered", "UnmergeReport"),
    "verbs.extract": ("extract",),
    "verbs.from_lora": ("from_lora",),
    "verbs.inspect.verb": ("inspect",),
    "verbs.merge": ("merge",),
    "verbs.push": ("push",),
    "verbs.unmerge": ("unmerge",),
    "verbs.to_lora": ("to_lora",),
    "verbs.verify": ("verify",),
    "reports.verify": ("OutputsReport", "VerifyReport"),
}  # fmt: skip
"""The module that defines each public name."""
_OWNER = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AdapterReport",
    "CheckpointReport",
    "DoraConvertError",
    "DryRunReport",
    "HubError",
    "MadeDryRun",
    "MadeReport",
    "MalformedError",
    "MergeReport",
    "NumericalError",
    "OutputError",
    "OutputsReport",
    "PlanError",
    "PushReport",
    "Recovered",
    "RefError",
    "UnmergeReport",
    "UnsupportedError",
    "UsageError",
    "VerificationError",
    "VerifyReport",
    "__version__",
    "extract",
    "from_lora",
    "inspect",
    "merge",
    "push",
    "to_lora",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _OWNER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_OWNER[name]}", __name__), name)
