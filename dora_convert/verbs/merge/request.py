"""A merge from what is asked for to its report: beside the base, in its place, or from Hub to Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...errors import UsageError
from ...hub.target import HubRoutes, transit_folder
from ...lazy_torch import without_collections
from ...optional_packages import need
from ...output.folder import OutputFolder
from ...output.in_place import InPlace, finished
from ...plan.options import Options, parse_weights
from ...plan.plan import Plan
from ...plan.planner import make_plan
from ...reports.merge import DryRunReport, MergeReport
from ...settings import Settings
from ...sources.download import fetch, wanted_of_base
from ...sources.inputs import doubts, gather
from ...sources.remote_headers import open_far
from ...sources.session import Session
from ...storage.checkpoint import Checkpoint, open_checkpoint
from ...storage.digests import xxh3
from ...storage.refs import PathLike, local_path, local_source
from ...undo.record import read_record
from ...undo.refusals import refuse_far, refuse_lossy

if TYPE_CHECKING:
    from .pipeline import Examine

IN_PLACE = "--in-place"


class MergeRequest(NamedTuple):
    """What is to be merged, and how."""

    base: PathLike | None
    adapters: Sequence[str]
    out: PathLike | None
    weight: Sequence[float]
    options: Options
    settings: Settings
    session: Session
    routes: HubRoutes
    verify_outputs: bool
    dry_run: bool


def merge_beside(asked: MergeRequest, overwrite: bool) -> MergeReport | DryRunReport:  # noqa: FBT001 - as the option
    """Write OUT, or what goes to the Hub alone."""
    routes = asked.routes
    if asked.verify_outputs:
        if not routes.local:
            raise UsageError("--no-local keeps nothing that --verify-outputs could run.", hint="name an OUT")
        need("verify", "--verify-outputs")
    refs = [str(asked.base), *asked.adapters]
    folder = OutputFolder(transit_folder(asked.out, routes, refs), overwrite=overwrite)
    folder.check()
    opened_by = (
        _open_whole if asked.verify_outputs else partial(_open_headers, weights=routes.weights(folder))
    )
    plan = _plan(asked, folder.given if routes.local else "OUT", opened_by)
    folder.refuse_inside([plan.base.source.path, *(adapter.source.path for adapter in plan.adapters)])
    return _carry_out(plan, folder, asked)


def merge_in_place(asked: MergeRequest, allow_lossy: bool) -> MergeReport | DryRunReport:  # noqa: FBT001 - as the option
    """Change the base itself; what an earlier run has staged is brought to its end first."""
    if asked.base is None or asked.out is not None:
        raise UsageError("--in-place takes BASE and ADAPTER, and no OUT.")
    refuse_far(asked.base, "BASE")
    if asked.routes.target or not asked.routes.local or asked.verify_outputs:
        raise UsageError(
            "--in-place goes neither with --push-to-hub nor with --verify-outputs.",
            hint="dora-convert push, or dora-convert verify --level outputs, afterwards",
        )
    refuse_lossy(asked.options.undo, allow_lossy=allow_lossy)
    if report := finished(asked.base, "merge", asked.adapters, asked.settings):
        return MergeReport.read(report)
    plan = _plan(asked, IN_PLACE, _open_local)
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


def _open_headers(asked: MergeRequest, ref: str, revision: str | None, *, weights: Path | None) -> Checkpoint:
    """The base's headers; its weights come when they are needed."""
    session, whole = asked.session, not asked.dry_run
    return open_far(ref, "BASE", session, whole=whole, revision=revision, weights=weights)


def _open_whole(asked: MergeRequest, ref: str, revision: str | None) -> Checkpoint:
    """The whole base, which is to be run."""
    return open_checkpoint(fetch(ref, "BASE", wanted_of_base, asked.session, revision=revision))


def _open_local(_: MergeRequest, ref: str, __: str | None) -> Checkpoint:
    """A base that is to be changed; an earlier run may have begun to."""
    return open_checkpoint(local_source(local_path(ref, "BASE")), unfinished=True)


def _plan(
    asked: MergeRequest, out: str, opened_by: Callable[[MergeRequest, str, str | None], Checkpoint]
) -> Plan:
    """Gather the inputs and decide every output tensor; what looks odd is warned of.

    `out` is what the command line has last.
    """
    settings, options = asked.settings, asked.options
    weights = parse_weights(asked.weight, len(asked.adapters))
    named = None if asked.base is None else os.fspath(asked.base)
    checkpoint, opened = gather(
        named,
        asked.adapters,
        out,
        asked.session,
        settings.notify,
        options.ignore_field,
        opened_by=partial(opened_by, asked),
    )
    for doubt in doubts(checkpoint, opened):
        settings.warn(doubt)
    return make_plan(checkpoint, opened, weights, options)


def _carry_out(plan: Plan, folder: OutputFolder | InPlace, asked: MergeRequest) -> MergeReport | DryRunReport:
    """Carry the plan out, with what it needs from the Hub and has for it."""
    if asked.dry_run:
        target = asked.routes.target
        out = folder.given if asked.routes.local or not target else target.repo
        return DryRunReport.of(plan, asked.settings, out=out)
    with without_collections():
        from ...hub.streaming import stream_merge
        from .pipeline import produce
    if isinstance(folder, InPlace):
        return produce(plan, folder, asked.settings)
    with stream_merge(plan, asked.routes, asked.session, folder) as hub, _examiner(plan, asked) as examine:
        return produce(plan, folder, asked.settings, hub, examine)


@contextmanager
def _examiner(plan: Plan, asked: MergeRequest) -> Iterator[Examine | None]:
    """What runs the output on sample prompts, where that is asked for."""
    if not asked.verify_outputs:
        yield None
        return
    from ...logits.compare import prepared

    with prepared(plan, asked.settings, (), None) as comparison:
        yield comparison.against
