"""Declare every option of the verbs once: its type, its default and its meaning, in groups that verbs combine.

The second argument of `Annotated` is the default. A verb takes its group as `**options: Unpack[Group]`, and `takes`
gives the verb a signature that lists them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any, TypedDict, TypeVar, cast, get_type_hints

Verb = TypeVar("Verb", bound=Callable[..., Any])
Path = str | os.PathLike[str]


class CallOptions(TypedDict, total=False):
    """Verbs that take a while and may reach the Hub."""

    on_progress: Annotated[Callable[[int, int], None] | None, None]
    """Called with the bytes done and the bytes in all, from worker threads."""
    on_notice: Annotated[Callable[[str], None] | None, None]
    """Called with each notice and each warning."""
    token: Annotated[str | None, None]
    """The Hub token; None for HF_TOKEN or the saved login. The token is neither printed nor stored."""


class ComputeOptions(CallOptions, total=False):
    """Verbs that compute."""

    device: Annotated[str, "auto"]
    """auto, cpu, cuda, cuda:N or mps."""
    workers: Annotated[int | None, None]
    """Threads; None for one per processor."""
    cache: Annotated[bool, True]
    """Keep downloads in the Hub cache; False removes them when the verb ends."""


class SelectOptions(TypedDict, total=False):
    """Verbs that may leave modules out."""

    include: Annotated[Sequence[str], ()]
    """Globs of the modules to take; none takes all."""
    exclude: Annotated[Sequence[str], ()]
    """Globs of the modules to leave out."""


class FieldOptions(TypedDict, total=False):
    """Verbs that read adapters."""

    ignore_field: Annotated[Sequence[str], ()]
    """Fields of adapter_config.json to accept although this version refuses them."""


class MatchOptions(TypedDict, total=False):
    """Verbs that match adapters with a base."""

    weight: Annotated[Sequence[float], ()]
    """Strengths of the adapters, in their order; none is 1 for each."""
    allow_unmatched: Annotated[bool, False]
    """Warn about adapter tensors that match nothing in the base, instead of raising."""


class DryRunOptions(TypedDict, total=False):
    """Verbs that can say in advance what they would do."""

    dry_run: Annotated[bool, False]
    """Return the plan and write nothing."""


class CommitOptions(TypedDict, total=False):
    """Verbs that may commit to the Hub, with a model card."""

    private: Annotated[bool, False]
    """Create the repo private; False leaves the choice to the account's default."""
    create_pr: Annotated[bool, False]
    """Open a pull request instead of committing."""
    commit_message: Annotated[str | None, None]
    """The message of the commit or the pull request."""
    base_model: Annotated[str | None, None]
    """The base's repo id for the card, if only a path is known."""


class WriteOptions(ComputeOptions, DryRunOptions, total=False):
    """Verbs that compute and write a folder."""

    compute_dtype: Annotated[str, "auto"]
    """auto, float64 or float32; auto is float64."""
    max_memory: Annotated[str | int, "160MiB"]
    """Bytes held at once, beyond Python and torch."""
    overwrite: Annotated[bool, False]
    """Replace an existing `out` of the same kind, if this package wrote it."""


class OutputOptions(WriteOptions, SelectOptions, CommitOptions, total=False):
    """Verbs that write a new model or adapter."""

    dtype: Annotated[str, "auto"]
    """The dtype to store: auto, bfloat16, float16 or float32."""
    push_to_hub: Annotated[str | None, None]
    """The repo id to upload the result to."""


class CheckpointOptions(TypedDict, total=False):
    """Verbs that write a checkpoint."""

    max_shard_size: Annotated[str | int | None, None]
    """Such as 5GB; None keeps the base's shards."""
    verify: Annotated[bool, True]
    """Check a sample of the output before publishing."""
    in_place: Annotated[bool, False]
    """Change the checkpoint itself; `out` is not given."""
    allow_lossy: Annotated[bool, False]
    """In place, do even what cannot be undone bit for bit."""


class MergeOptions(OutputOptions, CheckpointOptions, FieldOptions, MatchOptions, total=False):
    """The options of merge."""

    undo: Annotated[str | None, None]
    """The record to keep: norms, exact or none; None is exact in place unless `allow_lossy`, and norms otherwise."""
    verify_outputs: Annotated[bool, False]
    """Run base + adapter and the output on sample prompts before publishing."""
    no_local: Annotated[bool, False]
    """With `push_to_hub`, keep nothing on this machine; `out` is not given."""


class UnmergeOptions(WriteOptions, CheckpointOptions, FieldOptions, total=False):
    """The options of unmerge."""

    base: Annotated[Path | None, None]
    """The base itself, for values that no record holds."""


class FittingOptions(OutputOptions, total=False):
    """Verbs that write an adapter."""

    format: Annotated[str, "peft"]
    """The format of the adapter."""


class GoalOptions(TypedDict, total=False):
    """Verbs that compute factors; exactly one of the first three is given."""

    rank: Annotated[int | None, None]
    """The rank, lowered for a module that needs less."""
    energy: Annotated[float | None, None]
    """The share of squared singular values to keep."""
    max_error: Annotated[float | None, None]
    """The largest relative error of each module's ΔW."""
    exact_svd: Annotated[bool, False]
    """Never use the randomised SVD."""


class FromLoraOptions(FittingOptions, FieldOptions, total=False):
    """The options of from_lora."""

    init: Annotated[str, "preserve"]
    """preserve: m = ‖W + sBA‖; pretrained: m = ‖W‖."""
    split: Annotated[bool, False]
    """Leave modules that cannot be DoRA in a LoRA of their own, in `out`/lora."""


class ToLoraOptions(FittingOptions, FieldOptions, GoalOptions, total=False):
    """The options of to_lora."""


class ExtractOptions(FittingOptions, GoalOptions, total=False):
    """The options of extract."""

    kind: Annotated[str, "dora"]
    """dora: m, B and A; lora: B and A."""
    embeddings: Annotated[str, "full"]
    """Embeddings and heads that differ: full saves them whole, lora fits factors, skip leaves them out."""


class VerifyOptions(ComputeOptions, SelectOptions, FieldOptions, MatchOptions, total=False):
    """The options of verify."""

    level: Annotated[str, "weights"]
    """weights: compare every element; outputs: run the models."""
    samples: Annotated[int, 8]
    """Random inputs whose outputs are compared, for each module."""
    prompt: Annotated[Sequence[str], ()]
    """Texts to run the models on."""
    prompts: Annotated[Path | None, None]
    """A UTF-8 file with one more text a line."""
    report: Annotated[Path | None, None]
    """The HTML page to write; an existing file is replaced."""
    max_memory: Annotated[str | int | None, None]
    """Bytes held at once; None is 160MiB for weights and the free memory for outputs."""


class UploadOptions(CallOptions, CommitOptions, DryRunOptions, total=False):
    """The options of push."""


def takes(group: type, **defaults: object) -> Callable[[Verb], Verb]:
    """Return a decorator that gives a function the keywords of `group`, with `defaults` instead of the group's.

    The function is called with a value for every option. A keyword that is not in the group raises TypeError.
    """
    hints = get_type_hints(group, include_extras=True)
    keywords = [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            annotation=hint.__origin__,
            default=defaults.get(name, hint.__metadata__[0]),
        )
        for name, hint in hints.items()
    ]

    def decorate(verb: Verb) -> Verb:
        plain = signature(verb)
        listed = plain.replace(parameters=[*list(plain.parameters.values())[:-1], *keywords])

        @wraps(verb)
        def complete(*args: Any, **options: Any) -> Any:
            try:
                bound = listed.bind(*args, **options)
            except TypeError as error:
                raise TypeError(f"{verb.__name__}() {error}") from None
            bound.apply_defaults()
            return verb(*bound.args, **bound.kwargs)

        complete.__signature__ = listed  # type: ignore[attr-defined]
        return cast("Verb", complete)

    return decorate
