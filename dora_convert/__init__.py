"""Move between base + adapter and checkpoint: LoRA and DoRA, streaming, exact.

    >>> import dora_convert
    >>> report = dora_convert.merge("org/base", "org/adapter", "merged")  # doctest: +SKIP

The functions are the verbs of the command line. torch is imported when a verb runs, not before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .settings import __version__

if TYPE_CHECKING:
    from .errors import DoraConvertError as DoraConvertError
    from .errors import HubError as HubError
    from .errors import MalformedError as MalformedError
    from .errors import NumericalError as NumericalError
    from .errors import OutputError as OutputError
    from .errors import PlanError as PlanError
    from .errors import RefError as RefError
    from .errors import UnsupportedError as UnsupportedError
    from .errors import UsageError as UsageError
    from .errors import VerificationError as VerificationError
    from .reports.analyze import AnalyzeReport as AnalyzeReport
    from .reports.checkpoint import CheckpointReport as CheckpointReport
    from .reports.fitting import MadeDryRun as MadeDryRun
    from .reports.fitting import MadeReport as MadeReport
    from .reports.inspect import AdapterReport as AdapterReport
    from .reports.merge import DryRunReport as DryRunReport
    from .reports.merge import MergeReport as MergeReport
    from .reports.merge import Recovered as Recovered
    from .reports.merge import UnmergeReport as UnmergeReport
    from .reports.push import PushReport as PushReport
    from .reports.verify import OutputsReport as OutputsReport
    from .reports.verify import VerifyReport as VerifyReport
    from .verbs.analyze import analyze as analyze
    from .verbs.analyze import trainable_share as trainable_share
    from .verbs.extract import extract as extract
    from .verbs.from_lora import from_lora as from_lora
    from .verbs.inspect import inspect as inspect
    from .verbs.merge import merge as merge
    from .verbs.push import push as push
    from .verbs.to_lora import to_lora as to_lora
    from .verbs.unmerge import unmerge as unmerge
    from .verbs.verify import verify as verify

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
    "verbs.from_lora": ("from_lora",),
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
    if name not in _OWNER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_OWNER[name]}", __name__), name)
