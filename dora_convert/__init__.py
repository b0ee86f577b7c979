"""Move between base + adapter and checkpoint: LoRA and DoRA, streaming, exact.

    >>> import dora_convert
    >>> report = dora_convert.merge("org/base", "org/adapter", "merged")  # doctest: +SKIP

The functions are the verbs of the command line. torch is imported when a verb runs, not before. Type checkers
read `__init__.pyi`, which docs/generate.py writes.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "errors": (
        "DoraConvertError", "HubError", "MalformedError", "NumericalError", "OutputError", "PlanError",
        "RefError", "UnsupportedError", "UsageError", "VerificationError",
    ),
    "reports.analyze": ("AnalyzeReport",),
    "reports.fitting": ("MadeDryRun", "MadeReport"),
    "reports.checkpoint": ("CheckpointReport",),
    "reports.inspect": ("AdapterReport",),
    "reports.merge": ("DryRunReport", "MergeReport", "Recovered", "UnmergeReport"),
    "reports.push": ("PushReport",),
    "reports.verify": ("OutputsReport", "VerifyReport"),
    "verbs.analyze": ("analyze", "trainable_share"),
    "verbs.extract": ("extract",),
    "verbs.convert": ("convert",),
    "verbs.from_lora": ("from_lora",),
    "verbs.in_memory": ("iter_merged", "merge_state_dict"),
    "verbs.inspect": ("inspect",),
    "verbs.merge": ("merge",),
    "verbs.push": ("push",),
    "verbs.to_lora": ("to_lora",),
    "verbs.unmerge": ("unmerge",),
    "verbs.verify": ("verify",),
}  # fmt: skip
"""The module that defines each public name."""
_OWNER = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *_OWNER]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    owner = "settings" if name == "__version__" else _OWNER.get(name)
    if not owner:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{owner}", __name__), name)
    if owner.startswith("verbs."):
        from .api import public

        value = public(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__"])
