"""merge: fold adapters into a base."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..digests import xxh3
from ..errors import UsageError
from ..extras import need
from ..folder import OutputFolder, new_folder
from ..gather import doubts, gather
from ..heavy import without_collections
from ..in_place import InPlace, finished, refuse_lossy
from ..plan import Options, Plan
from ..planner import make_plan
from ..pushed import Target
from ..record import read_record
from ..refs import PathLike, listed
from ..report import DryRunReport, MergeReport
from ..sending import uploading
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
    verify_outputs: bool = False,
    base_model: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
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
    first adapter names. `out` must not exist unless `overwrite` is set; with `in_place` there is none, the base is changed
    where it is, and `undo` is "exact" unless `allow_lossy` is set. With `verify_outputs`, base and adapters, as PEFT
    runs them, and the merged model are run on sample prompts before it is published. With `push_to_hub`, a repo id, shards
    are uploaded as they are finished, and one commit is made before `out` gets its name. `on_progress` is called with
    bytes done and bytes in all, from worker threads; `on_notice` with each warning and choice as it comes up.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    kept = undo or ("exact" if in_place and not allow_lossy else "norms")
    options = parse_options(
        dtype, compute_dtype, max_shard_size, kept, include, exclude, allow_unmatched, ignore_field
    )
    told = (verify, base_model, on_progress, on_notice, token)
    settings = Settings.parse(device, compute_dtype, max_memory, workers, *told)
    target = Target.parse(push_to_hub, private, create_pr, commit_message, token)
    asked = Asked(base, listed(adapters), weight, options, settings, target, verify_outputs, dry_run)
    if verify_outputs:
        need("verify", "--verify-outputs")
    if in_place:
        return _in_place(asked, out, allow_lossy=allow_lossy)
    return _beside(asked, new_folder(out, "merge", overwrite=overwrite))


class Asked(NamedTuple):
    """What is to be merged, and how."""

    base: PathLike | None
    adapters: Sequence[str]
    weight: Sequence[float]
    options: Options
    settings: Settings
    target: Target | None
    verify_outputs: bool
    dry_run: bool


def _beside(asked: Asked, folder: OutputFolder) -> MergeReport | DryRunReport:
    """Write OUT."""
    plan = _plan(asked, folder.given)
    folder.refuse_inside([plan.base.source.path, *(adapter.source.path for adapter in plan.adapters)])
    return _carry_out(plan, folder, asked)


def _in_place(asked: Asked, out: PathLike | None, *, allow_lossy: bool) -> MergeReport | DryRunReport:
    """Change the base itself; what an earlier run has staged is brought to its end first."""
    if asked.base is None or out is not None:
        raise UsageError("--in-place takes BASE and ADAPTER, and no OUT.")
    if asked.target or asked.verify_outputs:
        raise UsageError(
            "--in-place goes neither with --push-to-hub nor with --verify-outputs.",
            hint="dora-convert push, or dora-convert verify --level outputs, afterwards",
        )
    refuse_lossy(asked.options.undo, allow_lossy=allow_lossy)
    if report := finished(asked.base, "merge", asked.adapters, asked.settings):
        return MergeReport.read(report)
    plan = _plan(asked, os.fspath(asked.base), unfinished=True)
    place = InPlace(plan.base.source.path, plan.base.shards, plan.base.index_name)
    place.refuse(plan)
    if not place.begun and _is_merged(plan):
        raise UsageError(
            f"{place.given} is merged with the very same adapter already.",
            hint=f"dora-convert unmerge --in-place {place.given} ADAPTER takes it out again",
        )
    return _carry_out(plan, place, asked)


def _is_merged(plan: Plan) -> bool:
    """Whether the last merge that a checkpoint has seen was of the same adapters, as strong."""
    if not (record := read_record(plan.base)):
        return False
    files = [{path.name: xxh3(path) for path in adapter.files} for adapter in plan.adapters]
    return plan.weights == record.weights and files == [each["files"] for each in record.receipt["adapters"]]


def _carry_out(plan: Plan, folder: OutputFolder | InPlace, asked: Asked) -> MergeReport | DryRunReport:
    if asked.dry_run:
        return DryRunReport.of(plan, asked.settings, folder.given)
    with without_collections():
        from ..produce import produce
    with uploading(asked.target, asked.settings.notify) as upload:
        if not asked.verify_outputs:
            return produce(plan, folder, asked.settings, upload)
        from ..outputs import prepared

        with prepared(plan, asked.settings, (), None) as comparison:
            return produce(plan, folder, asked.settings, upload, comparison.against)


def _plan(asked: Asked, out: str, *, unfinished: bool = False) -> Plan:
    """Gather the inputs and decide every output tensor; what looks odd is warned of."""
    base, adapters, weight, options, settings = asked[:5]
    weights = parse_weights(weight, len(adapters))
    named = None if base is None else os.fspath(base)
    checkpoint, opened = gather(
        named, adapters, out, settings.token, settings.notify, options.ignore_field, unfinished=unfinished
    )
    for doubt in doubts(checkpoint, opened):
        settings.warn(doubt)
    return make_plan(checkpoint, opened, weights, options)
