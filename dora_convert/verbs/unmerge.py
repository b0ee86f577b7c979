"""unmerge: take adapters out of a merged checkpoint again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from ..adapters import Adapter
from ..errors import RefError, UsageError
from ..options import UnmergeOptions
from ..output.folder import new_folder
from ..output.in_place import InPlace, finished
from ..output.side_files import SideFile, base_files
from ..plan.plan import Options, Plan, parse_options
from ..plan.undo_part import Undo
from ..reports.merge import DryRunReport, UnmergeReport
from ..settings import Settings
from ..sources import Session
from ..sources.inputs import Mode, open_adapter, open_base, refuse_swapped
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import RECORD, UNDO
from ..storage.reader import xxh3
from ..storage.refs import PathLike, listed, refuse_missing
from ..torch_import import without_collections
from ..undo.files import remaining_files, restored_files
from ..undo.record import MergeRecord, in_order, no_record, read_record
from ..undo.removal import following, plan_removal
from ..undo.unmerge_plan import UnmergePlan, plan_unmerge
from . import takes
from .in_place import open_place, refuse_lossy, refuse_options, refuse_out

if TYPE_CHECKING:
    from ..cluster.tensors import ClusterExecutor
    from ..output.output import Output


@takes(UnmergeOptions)
def unmerge(
    merged: PathLike,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike | None = None,
    **options: Unpack[UnmergeOptions],
) -> UnmergeReport | DryRunReport:
    """Take adapters out of a merged base: bit for bit if the merge's record is exact, else up to rounding.

    `adapters` are the very ones that were merged; `base` is the base itself, for values that no record holds.
    With `in_place`, `out` is not given: `merged` becomes the base where it is, which needs an exact record
    unless `allow_lossy` is set. The report's `exact` says how many tensors are proven to be the base's by
    their hashes.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    if options["cluster"] is not None:
        from .on_cluster import refuse_for_cluster

        refuse_for_cluster(options)
    refuse_options(options)
    selection = replace(parse_options(options), allow_unmatched=True)
    settings = Settings.parse(options)
    with Session(
        options["token"], cache=options["cache"], notify=settings.notify, follow_links=options["follow_links"]
    ) as session:
        request = UnmergeRequest(
            merged=os.fspath(merged),
            adapters=listed(adapters),
            out=out,
            options=options,
            selection=selection,
            settings=settings,
            session=session,
        )
        return _unmerge(request)


@dataclass(frozen=True, kw_only=True)
class UnmergeRequest:
    """The inputs and options of one unmerge, checked."""

    merged: str
    adapters: Sequence[str]
    out: PathLike | None
    options: UnmergeOptions
    selection: Options
    """The options that decide the plan."""
    settings: Settings
    session: Session


@dataclass(frozen=True)
class _Inputs:
    """The headers of an unmerge's inputs."""

    merged: Checkpoint
    base: Checkpoint | None
    record: MergeRecord
    adapters: Sequence[Adapter]
    numbers: Sequence[int]
    """The adapters' positions among all that were merged."""


def _unmerge(request: UnmergeRequest) -> UnmergeReport | DryRunReport:
    """Open the inputs, plan, and run the plan; first publish the files that a run in place has staged."""
    options, settings, folder = request.options, request.settings, None
    if options["in_place"]:
        path = refuse_out(request.merged, "MERGED", request.out)
        if report := finished(path, "unmerge", request.adapters, settings):
            return UnmergeReport.read(report)
    else:
        folder = new_folder(request.out, "unmerge", overwrite=options["overwrite"])
    last = folder.given if folder else "--in-place"
    refuse_swapped(request.merged, request.adapters, last, "unmerge", "MERGED")
    inputs = _open(request)
    reversal = _plan(request, inputs)
    files = _files(reversal, settings)
    if folder:
        checkpoints = [inputs.merged, *([inputs.base] if inputs.base else [])]
        folder.refuse_inside([checkpoint.source.path for checkpoint in checkpoints])
        folder.refuse_inside([adapter.source.path for adapter in inputs.adapters])
    output = folder or _open_place(reversal, options)
    if options["dry_run"]:
        return DryRunReport.of(reversal.plan, settings, out=output.given, command="unmerge")
    return _restore(request, reversal, inputs.record, files, output)


def _restore(
    request: UnmergeRequest, reversal: UnmergePlan, record: MergeRecord, files: Sequence[SideFile], output: Output
) -> UnmergeReport:
    """Run the plan while its inputs are downloaded."""
    later = {"later": partial(following, reversal, record)} if reversal.numbers else {}
    others = [reversal.original] if reversal.original else []
    with _nodes(request, reversal, output) as nodes:
        with without_collections(numpy=False):
            from ..undo.restore import restore
        from ..hub.streaming import stream_inputs

        with stream_inputs(reversal.plan, others, request.session) as hub:
            executor = nodes() if nodes else None
            return restore(reversal, files, output, request.settings, hub=hub, executor=executor, **later)


def _nodes(
    request: UnmergeRequest, reversal: UnmergePlan, output: Output
) -> AbstractContextManager[Callable[[], ClusterExecutor] | None]:
    """Return the nodes of --cluster, which start while torch is imported; None for this machine alone."""
    if request.options["cluster"] is None:
        return nullcontext()
    from .on_cluster import writing_nodes

    inputs = [reversal.plan.base.states, *(adapter.states for adapter in reversal.plan.adapters)]
    inputs += [reversal.original.states] if reversal.original else []
    return writing_nodes(request.options["cluster"], inputs, output.out, request.settings)


def _open(request: UnmergeRequest) -> _Inputs:
    """Return the headers of MERGED, of BASE and of the adapters, and the record of the merge."""
    options, session = request.options, request.session
    mode: Mode = "whole" if options["cluster"] else "headers"
    refuse_missing(
        ("MERGED", request.merged), *(("ADAPTER", ref) for ref in request.adapters), ("BASE", options["base"])
    )
    merged = open_base(request.merged, "MERGED", session, "local" if options["in_place"] else mode)
    base = open_base(os.fspath(options["base"]), "BASE", session, mode) if options["base"] else None
    record = read_record(merged)
    if record and record.torn:
        _warn_of_torn(merged, record, base, request.settings)
    waived = (record.options if record else request.selection).waived
    adapters = [open_adapter(ref, session, waived) for ref in request.adapters]
    if record:
        hashes = [{path.name: xxh3(path) for path in adapter.files} for adapter in adapters]
        return _Inputs(merged, base, record, *in_order(record, adapters, hashes))
    if options["in_place"]:
        raise UsageError(
            f"{merged.source.name} has no record of a merge: in place there is nothing to undo.",
            hint="perhaps it was undone already; without a record, name an OUT",
        )
    request.settings.warn(
        f"{merged.source.name} has no record of a merge: weights of 1 are assumed, and what rounding took is lost"
    )
    record = no_record(merged, len(adapters), options["ignore_field"], list(base_files(merged)))
    return _Inputs(merged, base, record, adapters, range(len(adapters)))


def _warn_of_torn(merged: Checkpoint, record: MergeRecord, base: Checkpoint | None, settings: Settings) -> None:
    """Warn about a receipt whose undo record is missing; RefError if only that record restores the base."""
    merge = f"{merged.source.name} was merged with --undo {record.options.undo}"
    why = f"{merge}, and its {RECORD}/{UNDO} is missing"
    if record.options.exact and not base:
        raise RefError(f"{why}.", hint="bring it back, name the base with --base, or copy the base itself")
    settings.warn(f"{why}: what rounding took is lost")


def _plan(request: UnmergeRequest, inputs: _Inputs) -> UnmergePlan:
    """Decide how every tensor of the base is restored."""
    merged, record, base, settings = inputs.merged, inputs.record, inputs.base, request.settings
    if len(inputs.numbers) < len(record.receipt.weights):
        reversal = plan_removal(merged, record, inputs.adapters, inputs.numbers, request.selection)
    else:
        reversal = plan_unmerge(merged, record, inputs.adapters, request.selection, base)
    if base and record.options.undo != "none" and not _reads(reversal.plan, base):
        settings.notify("the record holds all that is needed: --base is not read")
    elif base:
        settings.warn("norms are taken from BASE: copying BASE is simpler")
    return reversal


def _reads(plan: Plan, checkpoint: Checkpoint) -> bool:
    read = {stored.path for item in plan.items for stored in (item.source, *(item.undo or Undo()).tensors)}
    return not read.isdisjoint(tensor.path for tensor in checkpoint.tensors.values())


def _files(reversal: UnmergePlan, settings: Settings) -> list[SideFile]:
    """Return the files beside the weights; warn about files that cannot be restored."""
    if reversal.numbers:
        return remaining_files(reversal.plan.base)
    files = restored_files(reversal.plan.base, reversal.record, reversal.plan, reversal.original)
    if missing := sorted(reversal.record.receipt.base_files.keys() - {file.name for file in files}):
        settings.warn(f"not restored, no record holds them: {', '.join(missing)}")
    return files


def _open_place(reversal: UnmergePlan, options: UnmergeOptions) -> InPlace:
    """Return MERGED itself as the output; UsageError if it may not be changed."""
    if reversal.numbers:
        raise UsageError("--in-place takes all adapters out together.", hint="name all of them, or an OUT")
    refuse_lossy(reversal.record.options.undo, options)
    return open_place(reversal.plan)
