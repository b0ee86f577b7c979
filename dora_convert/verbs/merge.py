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
from ..refs import PathLike, listed
from ..report import DryRunReport, MergeReport
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
    token: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> MergeReport | DryRunReport:
    """Fold adapters into a base checkpoint: W' = W + Σ wᵢ·(applyᵢ(W) − W), each element rounded once.

    `base` and each of `adapters` is a folder or a Hub repo (`org/name[@revision]`); a base of None is the one that the
    first adapter names. `out` must not exist unless `overwrite` is set. With `verify_outputs`, base and adapters, as PEFT
    runs them, and the merged model are run on sample prompts before it is published. `on_progress` is called with bytes done and
    bytes in all, from worker threads; `on_notice` with each warning and choice as it comes up.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    options = parse_options(
        dtype, compute_dtype, max_shard_size, undo, include, exclude, allow_unmatched, ignore_field
    )
    settings = Settings.parse(
        device, compute_dtype, max_memory, workers, verify, base_model, on_progress, on_notice, token
    )
    folder = OutputFolder(Path(out), overwrite=overwrite)
    folder.check()
    if verify_outputs:
        need("verify", "--verify-outputs")
    plan = _plan(base, listed(adapters), weight, options, settings, folder)
    if dry_run:
        return DryRunReport.of(plan, settings, folder.given)
    return _carry_out(plan, folder, settings, verify_outputs=verify_outputs)


def _carry_out(plan: Plan, folder: OutputFolder, settings: Settings, *, verify_outputs: bool) -> MergeReport:
    """Make the output; with `verify_outputs`, what it takes to run it is found out before."""
    with without_collections():
        from ..produce import produce
    if not verify_outputs:
        return produce(plan, folder, settings)
    from ..outputs import prepared

    with prepared(plan, settings, (), None) as comparison:
        return produce(plan, folder, settings, comparison.against)


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
