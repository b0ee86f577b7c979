"""merge: fold adapters into a base."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..extras import need
from ..folder import OutputFolder
from ..gather import doubts, gather
from ..heavy import without_collections
from ..plan import Options, Plan
from ..planner import make_plan
from ..pushed import Target
from ..refs import PathLike, listed
from ..report import DryRunReport, MergeReport
from ..sending import uploading
from ..settings import Settings, parse_options, parse_weights


def merge(
    base: PathLike | None,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    weight: Sequence[float] = (),
    device: str = "auto",
    dtype: str = "auto",
    compute_dtype: str = "auto",
    max_shard_size: str | int | None = None,
    max_memory: str | int = "160MiB",
    workers: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    undo: str = "norms",
    allow_unmatched: bool = False,
    ignore_field: Sequence[str] = (),
    verify: bool = True,
    verify_outputs: bool = False,
    base_model: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> MergeReport | DryRunReport:
    """Fold adapters into a base checkpoint: W' = W + Σ wᵢ·(applyᵢ(W) − W), each element rounded once.

    `base` and each of `adapters` is a folder or a Hub repo (`org/name[@revision]`); a base of None is the one that the
    first adapter names. `out` must not exist unless `overwrite` is set. With `verify_outputs`, base and adapters, as PEFT
    runs them, and the merged model are run on sample prompts before it is published. With `push_to_hub`, a repo id, shards
    are uploaded as they are finished, and one commit is made before `out` gets its name. `on_progress` is called with
    bytes done and bytes in all, from worker threads; `on_notice` with each warning and choice as it comes up.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    limits = (dtype, compute_dtype, max_shard_size, undo)
    options = parse_options(*limits, include, exclude, allow_unmatched, ignore_field)
    others = (verify, base_model, on_progress, on_notice, token)
    settings = Settings.parse(device, compute_dtype, max_memory, workers, *others)
    target = Target.parse(push_to_hub, private, create_pr, commit_message, token)
    folder = OutputFolder(Path(out), overwrite=overwrite)
    folder.check()
    if verify_outputs:
        need("verify", "--verify-outputs")
    plan = _plan(base, listed(adapters), weight, options, settings, folder)
    if dry_run:
        return DryRunReport.of(plan, settings, folder.given)
    return _run(plan, folder, settings, target, verify_outputs=verify_outputs)


def _run(
    plan: Plan, folder: OutputFolder, settings: Settings, target: Target | None, *, verify_outputs: bool
) -> MergeReport:
    """Carry the plan out, and push what comes of it where there is a target; run it first where that is asked for."""
    with without_collections():
        from ..produce import produce
    with uploading(target, settings.notify) as upload:
        if not verify_outputs:
            return produce(plan, folder, settings, upload)
        from ..outputs import prepared

        with prepared(plan, settings, (), None) as comparison:
            return produce(plan, folder, settings, upload, comparison.against)


def _plan(
    base: PathLike | None,
    adapters: Sequence[str],
    weight: Sequence[float],
    options: Options,
    settings: Settings,
    folder: OutputFolder,
) -> Plan:
    """Gather the inputs and decide every output tensor; what looks odd is warned of."""
    weights = parse_weights(weight, len(adapters))
    named = None if base is None else os.fspath(base)
    checkpoint, opened = gather(
        named, adapters, folder.given, settings.token, settings.notify, options.ignore_field
    )
    folder.refuse_inside([checkpoint.source.path, *(adapter.source.path for adapter in opened)])
    for doubt in doubts(checkpoint, opened):
        settings.warn(doubt)
    return make_plan(checkpoint, opened, weights, options)
