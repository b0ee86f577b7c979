"""merge: fold adapters into a base."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UsageError
from ..folder import OutputFolder
from ..gather import doubts, gather
from ..heavy import without_collections
from ..in_place import InPlace, finished, refuse_lossy
from ..plan import Options, Plan
from ..planner import make_plan
from ..refs import PathLike, listed
from ..report import DryRunReport, MergeReport
from ..settings import Settings, parse_options, parse_weights


def merge(
    base: PathLike | None,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike | None = None,
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
    undo: str | None = None,
    allow_unmatched: bool = False,
    ignore_field: Sequence[str] = (),
    verify: bool = True,
    base_model: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    in_place: bool = False,
    allow_lossy: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> MergeReport | DryRunReport:
    """Fold adapters into a base checkpoint: W' = W + Σ wᵢ·(applyᵢ(W) − W), each element rounded once.

    `base` and each of `adapters` is a folder or a Hub repo (`org/name[@revision]`); a base of None is the one that the
    first adapter names. `out` must not exist unless `overwrite` is set. `on_progress` is called with bytes done and
    bytes in all, from worker threads; `on_notice` with each warning and choice as it comes up.

    With `in_place` there is no `out`: the base is changed where it is, and `undo` is "exact" unless `allow_lossy` is set.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    kept = undo or ("norms" if allow_lossy or not in_place else "exact")
    options = parse_options(
        dtype, compute_dtype, max_shard_size, kept, include, exclude, allow_unmatched, ignore_field
    )
    settings = Settings.parse(
        device, compute_dtype, max_memory, workers, verify, base_model, on_progress, on_notice, token
    )
    if in_place:
        refuse_lossy(kept, allow_lossy=allow_lossy)
        return _in_place(base, listed(adapters), weight, options, settings, out, dry_run=dry_run)
    if out is None:
        raise UsageError("merge needs OUT, or --in-place.")
    folder = OutputFolder(Path(out), overwrite=overwrite)
    folder.check()
    plan = _plan(base, listed(adapters), weight, options, settings, folder.given)
    folder.refuse_inside([plan.base.source.path, *(adapter.source.path for adapter in plan.adapters)])
    if dry_run:
        return DryRunReport.of(plan, settings, folder.given)
    with without_collections():
        from ..produce import produce
    return produce(plan, folder, settings)


def _in_place(
    base: PathLike | None,
    adapters: Sequence[str],
    weight: Sequence[float],
    options: Options,
    settings: Settings,
    out: PathLike | None,
    *,
    dry_run: bool,
) -> MergeReport | DryRunReport:
    """Change the base itself; what an earlier run has staged is brought to its end first."""
    if base is None or out is not None:
        raise UsageError("--in-place takes BASE and ADAPTER, and no OUT.")
    if (report := finished(base, "merge", adapters, settings)) is not None:
        return MergeReport.read(report)
    plan = _plan(base, adapters, weight, options, settings, os.fspath(base), unfinished=True)
    place = InPlace(plan.base.source.path, plan.base.shards, plan.base.index_name)
    place.refuse(plan)
    if dry_run:
        return DryRunReport.of(plan, settings, place.given)
    with without_collections():
        from ..produce import produce
    return produce(plan, place, settings)


def _plan(
    base: PathLike | None,
    adapters: Sequence[str],
    weight: Sequence[float],
    options: Options,
    settings: Settings,
    out: str,
    *,
    unfinished: bool = False,
) -> Plan:
    """Gather the inputs and decide every output tensor; what looks odd is warned of."""
    weights = parse_weights(weight, len(adapters))
    named = None if base is None else os.fspath(base)
    checkpoint, opened = gather(
        named, adapters, out, settings.token, settings.notify, options.ignore_field, unfinished=unfinished
    )
    for doubt in doubts(checkpoint, opened):
        settings.warn(doubt)
    return make_plan(checkpoint, opened, weights, options)
