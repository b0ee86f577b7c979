"""merge: fold adapters into a base."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

from ..folder import OutputFolder
from ..gather import doubts, gather
from ..heavy import without_collections
from ..plan import Options, Plan
from ..planner import make_plan
from ..pushed import Target
from ..refs import PathLike, listed
from ..remote import open_far
from ..report import DryRunReport, MergeReport
from ..routes import Routes, place_of
from ..settings import Settings, parse_options, parse_weights


def merge(
    base: PathLike | None,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike | None,
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
    base_model: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    cache: bool = True,
    no_local: bool = False,
    token: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> MergeReport | DryRunReport:
    """Fold adapters into a base checkpoint: W' = W + Σ wᵢ·(applyᵢ(W) − W), each element rounded once.

    `base` and each of `adapters` is a folder or a Hub repo; a base of None is the one that the first adapter names.
    `out` must not exist unless `overwrite` is set. With `push_to_hub` shards are uploaded as they are finished and
    committed before `out` gets its name; with `no_local`, too, `out` is None and nothing stays here. `on_progress` is
    called with bytes done and in all, from worker threads; `on_notice` with each warning and choice as it comes up.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    selected = (include, exclude, allow_unmatched, ignore_field)
    options = parse_options(dtype, compute_dtype, max_shard_size, undo, *selected)
    others = (verify, base_model, on_progress, on_notice, token)
    settings = Settings.parse(device, compute_dtype, max_memory, workers, *others)
    target = Target.parse(push_to_hub, private, create_pr, commit_message, token)
    routes = Routes(target, cache=cache and not no_local, local=not no_local)
    refs = listed(adapters)
    folder = OutputFolder(place_of(out, routes, [str(base), *refs]), overwrite=overwrite)
    plan = _plan(base, refs, weight, options, settings, folder, routes, whole=not dry_run)
    return DryRunReport.of(plan, settings, folder.given) if dry_run else _run(plan, folder, settings, routes)


def _run(plan: Plan, folder: OutputFolder, settings: Settings, routes: Routes) -> MergeReport:
    """Carry the plan out, with what it needs from the Hub and has for it."""
    with without_collections():
        from ..produce import produce
        from ..traffic import traffic
    with traffic(plan, routes, settings, folder) as hub:
        return produce(plan, folder, settings, hub)


def _plan(
    base: PathLike | None,
    adapters: Sequence[str],
    weight: Sequence[float],
    options: Options,
    settings: Settings,
    folder: OutputFolder,
    routes: Routes,
    *,
    whole: bool,
) -> Plan:
    """Gather the inputs and decide every output tensor; what looks odd is warned of."""
    folder.check()
    opener = partial(open_far, "BASE", settings.token, whole, routes.weights(folder))
    weights = parse_weights(weight, len(adapters))
    named = None if base is None else os.fspath(base)
    checkpoint, opened = gather(
        named, adapters, folder.given, settings.token, settings.notify, options.ignore_field, opened_by=opener
    )
    folder.refuse_inside([checkpoint.source.path, *(adapter.source.path for adapter in opened)])
    for doubt in doubts(checkpoint, opened):
        settings.warn(doubt)
    return make_plan(checkpoint, opened, weights, options)
