"""Declare every option of the verbs once: its type in a group, its default and its help in a table.

A verb takes a group as `**options: Unpack[Group]`, and `verbs.takes` gives the verb a signature that lists
the group. The command line makes its options of the same groups.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar, get_type_hints

Verb = TypeVar("Verb", bound=Callable[..., Any])
Path = str | os.PathLike[str]
if TYPE_CHECKING:
    import torch

    Dtype = str | torch.dtype
    Device = str | torch.device
else:  # signatures and help name no type of torch, which is imported later
    Dtype = Device = str

SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Further names of choices."""


class Option(NamedTuple):
    """An option's default and help, and the values that the option takes."""

    default: Any
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    least: int | None = None


_BUDGET = "Bytes held at once, beyond Python and torch"

# fmt: off
OPTIONS = {
    "init": Option("preserve", "preserve: m = ‖W + sBA‖, same outputs; pretrained: m = ‖W‖, as the paper.",
                   choices=("preserve", "pretrained")),
    "split": Option(False, "Leave modules that cannot be DoRA as LoRA in OUT/lora."),
    "kind": Option("dora", "dora: magnitudes and factors; lora: factors alone.", choices=("dora", "lora")),
    "embeddings": Option("full", "Embeddings and heads that differ; skip leaves out norms and biases, too.",
                         choices=("full", "lora", "skip")),
    "level": Option("weights", "Compare every element of the weights, or the models' outputs.",
                    choices=("weights", "outputs")),
    "samples": Option(8, "Random inputs whose outputs are compared, for each module.", "N", least=0),
    "prompt": Option((), "Text to run the models on; repeatable.", "TEXT"),
    "prompts": Option(None, "File with one more text a line; UTF-8.", "FILE"),
    "top": Option(10, "Modules shown, those that moved most first.", "N", least=1),
    "csv": Option(None, "Write the points as a table, too.", "FILE.csv"),
    "plot": Option(None, "Draw ΔM over ΔD: .png and .svg need matplotlib, .html does not.", "FILE"),
    "report": Option(None, "Write the report as a self-contained page, too.", "FILE.html"),
    "weight": Option((), "Strength, one per ADAPTER in their order.", "W"),
    "base": Option(None, "The base itself, for values that no record holds.", "REF"),
    "rank": Option(None, "The rank, lowered if no module has so much to give.", "N", least=1),
    "energy": Option(None, "Or the share of squared singular values to keep.", "F"),
    "max_error": Option(None, "Or the largest relative error of each module.", "F"),
    "ranks": Option("one", "one: the largest that any module needs, for all; per-module: each its own, which not all "
                    "programs read right.", choices=("one", "per-module")),
    "exact_svd": Option(False, "Never use the randomised SVD, which large matrices get."),
    "format": Option("peft", "Format of the new adapter.", "NAME"),
    "dtype": Option("auto", "Dtype to store, except for magnitudes; auto keeps each tensor's own.",
                    choices=("auto", "bfloat16", "float16", "float32")),
    "legacy_config": Option(False, "Write config.json's rope_parameters in the older fields, too."),
    "max_shard_size": Option(None, "Such as 5GB or 4GiB; default the base's own shards.", "SIZE"),
    "device": Option("auto", "Device that computes.", "auto|cpu|cuda[:N]|mps"),
    "compute_dtype": Option("auto", "Dtype of the arithmetic, rounded once at the end; auto is float64.",
                            choices=("auto", "float64", "float32")),
    "max_memory": Option("160MiB", f"{_BUDGET}.", "SIZE"),
    "workers": Option(None, "Threads; default one per processor.", "N", least=1),
    "include": Option((), "Only modules of this name; repeatable.", "GLOB"),
    "exclude": Option((), "No modules of this name; repeatable.", "GLOB"),
    "undo": Option(None, "Record that unmerge needs: norms (default; up to rounding) or exact (bit for bit).",
                   choices=("norms", "exact", "none")),
    "verify": Option(True, "Check a sample of the output before publishing."),
    "verify_outputs": Option(False, "Run base + adapter and the output on sample prompts before publishing."),
    "allow_unmatched": Option(False, "Warn about adapter tensors that match nothing in the base."),
    "ignore_field": Option((), "Accept a field of adapter_config.json that is refused otherwise.", "NAME"),
    "ignore_file": Option((), "Leave out a weight file beside the adapter; repeatable.", "NAME"),
    "alpha": Option(None, "The adapter's alpha, if its files do not hold it.", "A"),
    "scaling": Option(None, "The adapter's scaling itself, such as alpha/r, if its files do not hold it.", "S"),
    "axis": Option(None, "Along which side magnitudes lie, if nothing else tells.", choices=("rows", "columns")),
    "enable_lora": Option(None, "Which blocks of loralib's MergedLinear have factors.", "true,false,…"),
    "strict": Option(False, "Refuse an adapter that lacks what its config says was trained."),
    "base_model": Option(None, "The base's repo id for card and config, if only a path is known.", "ID"),
    "push_to_hub": Option(None, "Upload the result, too, while it is written.", "REPO_ID"),
    "private": Option(False, "Create the repo private; default the account's own."),
    "create_pr": Option(False, "Open a pull request instead of committing."),
    "commit_message": Option(None, "Message of the commit or the pull request.", "TEXT"),
    "no_local": Option(False, "With --push-to-hub: keep nothing on this machine, take no OUT."),
    "dry_run": Option(False, "Print the plan and write nothing."),
    "follow_links": Option(False, "Copy side files that are links to files elsewhere."),
    "overwrite": Option(False, "Replace an existing OUT."),
    "in_place": Option(False, "Change the checkpoint itself; take no OUT."),
    "allow_lossy": Option(False, "In place, do even what cannot be undone bit for bit."),
    "cache": Option(True, "Keep downloads in the Hub cache, or remove them at the end."),
    "token": Option(None, "Hub token; better is HF_TOKEN or hf auth login.", "TOKEN"),
    "on_progress": Option(None, "Called with the bytes done and the bytes in all, from worker threads."),
    "on_notice": Option(None, "Called with each notice and each warning."),
}
# fmt: on
"""All options, in the order of help and signatures."""


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

    weight: Sequence[float] | float
    allow_unmatched: bool
    strict: bool


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
    max_memory: str | int
    dry_run: bool
    overwrite: bool
    follow_links: bool


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


class MergeOptions(MatchOptions, FieldOptions, CheckpointOptions, OutputOptions, total=False):
    """The options of merge."""

    undo: str | None
    legacy_config: bool
    verify_outputs: bool
    no_local: bool


class StreamOptions(MatchOptions, FieldOptions, SelectOptions, TokenOptions, CallOptions, total=False):
    """The options of iter_merged and merge_state_dict."""

    dtype: Dtype
    device: Device
    compute_dtype: Dtype
    max_memory: str | int
    workers: int | None


class UnmergeOptions(FieldOptions, CheckpointOptions, WriteOptions, total=False):
    """The options of unmerge."""

    base: Path | None


class FittingOptions(OutputOptions, total=False):
    """Verbs that write an adapter."""

    format: str


class FromLoraOptions(FieldOptions, FittingOptions, total=False):
    """The options of from_lora."""

    init: str
    split: bool


class ToLoraOptions(GoalOptions, FieldOptions, FittingOptions, total=False):
    """The options of to_lora."""


class ExtractOptions(GoalOptions, FittingOptions, total=False):
    """The options of extract."""

    kind: str
    embeddings: str


class VerifyOptions(MatchOptions, SelectOptions, FieldOptions, ComputeOptions, total=False):
    """The options of verify."""

    level: str
    samples: int
    prompt: Sequence[str]
    prompts: Path | None
    report: Path | None
    max_memory: str | int | None


class AnalyzeOptions(SelectOptions, FieldOptions, ComputeOptions, total=False):
    """The options of analyze."""

    compute_dtype: Dtype
    max_memory: str | int
    allow_unmatched: bool
    top: int
    csv: Path | None
    plot: Path | None
    report: Path | None


class InspectOptions(FieldOptions, HubOptions, total=False):
    """The options of inspect."""


class UploadOptions(CommitOptions, TokenOptions, CallOptions, total=False):
    """The options of push."""

    dry_run: bool


_AUTO = Option("auto", f"{_BUDGET}; auto grows to the need of the largest module.", "SIZE")
_FREE = Option(None, f"{_BUDGET}; default 160MiB for weights, the free memory for outputs.", "SIZE")
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
