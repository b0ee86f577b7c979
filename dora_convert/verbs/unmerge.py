"""unmerge: take adapters out of a merged checkpoint again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.adapter import Adapter
from ..errors import RefError, UsageError
from ..lazy_torch import without_collections
from ..output.folder import new_folder
from ..output.in_place import InPlace, finished
from ..output.side_files import SideFile, base_files
from ..plan.item import Undo
from ..plan.options import Options, parse_options
from ..plan.plan import Plan
from ..reports.merge import DryRunReport, UnmergeReport
from ..settings import Settings
from ..sources.inputs import open_adapter, open_base, refuse_swapped
from ..sources.session import Session, open_session
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import RECORD, UNDO
from ..storage.reader import xxh3
from ..storage.refs import PathLike, listed
from ..undo.files import restored_files
from ..undo.record import MergeRecord, in_order, no_record, read_record
from ..undo.refusals import refuse_far, refuse_lossy, refuse_options
from ..undo.removal import following, plan_removal, remaining_files
from ..undo.unmerge_plan import UnmergePlan, plan_unmerge

if TYPE_CHECKING:
    from ..output.output import Output


def unmerge(
    merged: PathLike,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike | None = None,
    *,
    base: PathLike | None = None,
    device: str = "auto",
    compute_dtype: str = "auto",
    max_shard_size: str | int | None = None,
    max_memory: str | int = "160MiB",
    workers: int | None = None,
    ignore_field: Sequence[str] = (),
    verify: bool = True,
    cache: bool = True,
    token: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    in_place: bool = False,
    allow_lossy: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> UnmergeReport | DryRunReport:
    """Take adapters out of what `merge` made of a base: bit for bit where its record is exact, else up to rounding.

    `adapters` are the very ones that were merged; `base` is the base itself, for what no record holds. With `in_place`
    there is no `out`: `merged` becomes the base where it is, which needs an exact record unless `allow_lossy` is set. The
    report's `exact` says how many tensors are proven to be the base's by their hashes.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    refuse_options(in_place=in_place, overwrite=overwrite, allow_lossy=allow_lossy)
    options = parse_options("auto", compute_dtype, max_shard_size, "none", (), (), True, ())
    told = (device, compute_dtype, max_memory, workers, verify, None, on_progress, on_notice)
    settings = Settings.parse(*told, token=token, cache=cache)
    with open_session(token, cache=cache, notify=settings.notify) as session:
        refs = listed(adapters)
        if in_place and (report := _finished(merged, refs, out, settings)):
            return report
        folder = None if in_place else new_folder(out, "unmerge", overwrite=overwrite)
        last = folder.given if folder else "--in-place"
        refuse_swapped(os.fspath(merged), refs, last, "unmerge", "MERGED")
        reversal, record, inputs = _plan(
            merged, refs, base, options, settings, session, ignore_field, unfinished=in_place
        )
        files = _files(reversal, settings)
        if folder:
            folder.refuse_inside(inputs)
        place = folder or _place(reversal, allow_lossy=allow_lossy)
        if dry_run:
            return DryRunReport.of(reversal.plan, settings, out=place.given, command="unmerge")
        return _restore(reversal, record, files, place, settings, session)


def _restore(
    reversal: UnmergePlan,
    record: MergeRecord,
    files: Sequence[SideFile],
    place: Output,
    settings: Settings,
    session: Session,
) -> UnmergeReport:
    """Carry it out, with what it reads of the Hub."""
    with without_collections():
        from ..hub.streaming import stream_inputs
        from ..undo.restore import restore
    later = [partial(following, reversal, record)] if reversal.places else []
    others = [reversal.original] if reversal.original else []
    with stream_inputs(reversal.plan, others, session) as hub:
        return restore(reversal, files, place, settings, hub, *later)


def _plan(
    merged: PathLike,
    adapters: Sequence[str],
    base: PathLike | None,
    options: Options,
    settings: Settings,
    session: Session,
    ignore_field: Sequence[str],
    *,
    unfinished: bool,
) -> tuple[UnmergePlan, MergeRecord, list[Path]]:
    """Gather the inputs and decide how every tensor of the base comes back; with the record, and the inputs' folders."""
    checkpoint = open_base(os.fspath(merged), "MERGED", session, "local" if unfinished else "headers")
    original = open_base(os.fspath(base), "BASE", session) if base else None
    record, opened, places = _record(checkpoint, adapters, settings, session, ignore_field, original)
    if unfinished and record.assumed:
        raise UsageError(
            f"{checkpoint.source.name} has no record of a merge: in place there is nothing to undo.",
            hint="perhaps it was undone already; without a record, name an OUT",
        )
    sources = [checkpoint.source, *(adapter.source for adapter in opened)]
    sources += [original.source] if original else []
    if len(places) < len(record.receipt.weights):
        reversal = plan_removal(checkpoint, record, opened, places, options)
    else:
        reversal = plan_unmerge(checkpoint, record, opened, options, original)
    if original and record.options.undo != "none" and not _reads(reversal.plan, original):
        settings.notify("the record holds all that is needed: --base is not read")
    elif original:
        settings.warn("norms are taken from BASE: copying BASE is simpler")
    return reversal, record, [source.path for source in sources]


def _reads(plan: Plan, checkpoint: Checkpoint) -> bool:
    """Whether a plan reads weights of a checkpoint."""
    read = {stored.path for item in plan.items for stored in (item.source, *(item.undo or Undo()).tensors)}
    return not read.isdisjoint(tensor.path for tensor in checkpoint.tensors.values())


def _files(reversal: UnmergePlan, settings: Settings) -> list[SideFile]:
    """What will lie beside the weights; what cannot be restored is warned of."""
    if reversal.places:
        return remaining_files(reversal.plan.base)
    files = restored_files(reversal.plan.base, reversal.record, reversal.plan, reversal.original)
    if gone := sorted(reversal.record.receipt.base_files.keys() - {file.name for file in files}):
        settings.warn(f"not restored, no record holds them: {', '.join(gone)}")
    return files


def _finished(
    merged: PathLike, adapters: Sequence[str], out: PathLike | None, settings: Settings
) -> UnmergeReport | None:
    """The report of an earlier run that had staged all its files, once they are in their places."""
    if out is not None:
        raise UsageError("--in-place takes MERGED and ADAPTER, and no OUT.")
    refuse_far(merged, "MERGED")
    report = finished(merged, "unmerge", adapters, settings)
    return UnmergeReport.read(report) if report else None


def _place(reversal: UnmergePlan, *, allow_lossy: bool) -> InPlace:
    """MERGED itself, if it may be changed."""
    if reversal.places:
        raise UsageError("--in-place takes all adapters out together.", hint="name all of them, or an OUT")
    refuse_lossy(reversal.record.options.undo, allow_lossy=allow_lossy)
    merged = reversal.plan.base
    place = InPlace(merged.source.path, merged.shards, merged.index_name)
    place.refuse(reversal.plan)
    return place


def _record(
    merged: Checkpoint,
    refs: Sequence[str],
    settings: Settings,
    session: Session,
    ignore_field: Sequence[str],
    original: Checkpoint | None,
) -> tuple[MergeRecord, list[Adapter], list[int]]:
    """What is known of the merge, its adapters in their order, and which of them they are."""
    record = read_record(merged)
    if record and record.torn:
        why = f"{merged.source.name} was merged with --undo {record.options.undo}, and its {RECORD}/{UNDO} is missing"
        if record.options.exact and not original:
            raise RefError(
                f"{why}.", hint="bring it back, name the base with --base, or copy the base itself"
            )
        settings.warn(f"{why}: what rounding took is lost")
    accepted = record.options.ignore_field if record else ignore_field
    opened = [open_adapter(ref, session, accepted) for ref in refs]
    if not record:
        settings.warn(
            f"{merged.source.name} has no record of a merge: weights of 1 are assumed, and what rounding took is lost"
        )
        files = list(base_files(merged))
        return no_record(merged, len(opened), accepted, files), opened, list(range(len(opened)))
    hashes = [{path.name: xxh3(path) for path in adapter.files} for adapter in opened]
    return record, *in_order(record, opened, hashes)
