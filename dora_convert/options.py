"""Declare every option of the verbs once: its type in a group, its default and its help in a table.

A verb takes a group as `**options: Unpack[Group]`, and `verbs.takes` gives the verb a signature that lists
the group. The command line makes its options of the same groups.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, get_type_hints

from .option_table import BUDGET, OPTIONS, Option

Verb = TypeVar("Verb", bound=Callable[..., Any])
Path = str | os.PathLike[str]
if TYPE_CHECKING:
    import torch

    Dtype = str | torch.dtype
    Device = str | torch.device | Sequence[str | torch.device]
else:  # signatures and help name no type of torch, which is imported later
    Dtype = Device = str
SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Further names of choices."""


class CallOptions(TypedDict, total=False):
    """Verbs that take a while."""

    on_progress: Callable[[int, int], None] | None
    on_notice: Callable[[str], None] | None


class TokenOptions(TypedDict, total=False):
    """Verbs that may reach the Hub."""

    token: str | None


class HubOptions(TokenOptions, total=False):
    """Verbs that read from the Hub."""

    cache: bool


class SelectOptions(TypedDict, total=False):
    """Verbs that may leave modules out."""

    include: Sequence[str]
    exclude: Sequence[str]


class FieldOptions(TypedDict, total=False):
    """Verbs that read adapters."""

    ignore_field: Sequence[str]
    ignore_file: Sequence[str]
    alpha: float | None
    scaling: float | None
    axis: str | None
    enable_lora: str | Sequence[bool] | None


class MatchOptions(TypedDict, total=False):
    """Verbs that match adapters with a base."""

    allow_unmatched: bool
    strict: bool


class CombineOptions(TypedDict, total=False):
    """Verbs that combine adapters."""

    weight: Sequence[float] | float
    method: str | None
    density: Sequence[float] | float
    seed: int
    majority_sign: str


class CommitOptions(TypedDict, total=False):
    """Verbs that may commit to the Hub, with a model card."""

    private: bool
    create_pr: bool
    commit_message: str | None
    base_model: str | None


class ComputeOptions(HubOptions, CallOptions, total=False):
    """Verbs that compute."""

    device: Device
    workers: int | None


class WriteOptions(ComputeOptions, total=False):
    """Verbs that compute and write a folder."""

    compute_dtype: Dtype
    max_memory: str | int | None
    dry_run: bool
    overwrite: bool
    follow_links: bool


class ClusterOptions(TypedDict, total=False):
    """Verbs whose work several machines may share."""

    cluster: str | None


class OutputOptions(SelectOptions, CommitOptions, WriteOptions, total=False):
    """Verbs that write a new model or adapter."""

    dtype: Dtype
    push_to_hub: str | None


class CheckpointOptions(TypedDict, total=False):
    """Verbs that write a checkpoint."""

    max_shard_size: str | int | None
    verify: bool
    in_place: bool
    allow_lossy: bool


class GoalOptions(TypedDict, total=False):
    """Verbs that compute factors; exactly one of the first three is given."""

    rank: int | None
    energy: float | None
    max_error: float | None
    ranks: str
    exact_svd: bool


class MergeOptions(
    CombineOptions, MatchOptions, FieldOptions, CheckpointOptions, ClusterOptions, OutputOptions, total=False
):
    """The options of merge."""

    undo: str | None
    base_as: str | None
    dequantize: bool
    dequantize_touched: bool
    requantize: bool
    legacy_config: bool
    verify_outputs: bool
    no_local: bool


class UnmergeOptions(FieldOptions, CheckpointOptions, ClusterOptions, WriteOptions, total=False):
    """The options of unmerge."""

    base: Path | None


class FittingOptions(OutputOptions, total=False):
    """Verbs that write an adapter."""

    format: str


class ConvertOptions(FieldOptions, FittingOptions, total=False):
    """The options of convert."""

    to: str | None
    base: Path | None


class FromLoraOptions(FieldOptions, FittingOptions, total=False):
    """The options of from_lora."""

    init: str
    split: bool


class ToLoraOptions(CombineOptions, GoalOptions, FieldOptions, FittingOptions, total=False):
    """The options of to_lora."""


class ExtractOptions(GoalOptions, FittingOptions, total=False):
    """The options of extract."""

    kind: str
    embeddings: str


class VerifyOptions(
    CombineOptions, MatchOptions, SelectOptions, FieldOptions, ClusterOptions, ComputeOptions, total=False
):
    """The options of verify."""

    base_as: str | None
    level: str
    samples: int
    prompt: Sequence[str]
    prompts: Path | None
    report: Path | None
    max_memory: str | int | None


class AnalyzeOptions(SelectOptions, FieldOptions, ComputeOptions, total=False):
    """The options of analyze."""

    compute_dtype: Dtype
    max_memory: str | int | None
    allow_unmatched: bool
    top: int
    spectrum: bool
    csv: Path | None
    plot: Path | None
    report: Path | None


class InspectOptions(FieldOptions, HubOptions, total=False):
    """The options of inspect."""

    report: Path | None


class UploadOptions(CommitOptions, TokenOptions, CallOptions, total=False):
    """The options of push."""

    dry_run: bool


_AUTO = Option("auto", f"{BUDGET}; auto grows to the need of the largest module.", "SIZE")
_FREE = Option(None, f"{BUDGET}; default 160MiB for weights, the free memory for outputs.", "SIZE")
_MEMORY = {ToLoraOptions: _AUTO, ExtractOptions: _AUTO, VerifyOptions: _FREE}
"""The memory budget of verbs that do not stream with a fixed one."""


def options_of(group: type) -> dict[str, tuple[Any, Option]]:
    """Return the type and the declaration of every option of a group."""
    kinds = get_type_hints(group)
    table = {**OPTIONS, "max_memory": _MEMORY.get(group, OPTIONS["max_memory"])}
    return {name: (kinds[name], option) for name, option in table.items() if name in kinds}


def flag(name: str) -> str:
    """Return an option's name on the command line."""
    return f"--{name.replace('_', '-')}"
