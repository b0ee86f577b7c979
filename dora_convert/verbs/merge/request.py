"""A merge from what is asked for to its report: beside the base, in its place, or from Hub to Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...errors import UsageError
from ...hub.target import HubRoutes, transit_folder
from ...lazy_torch import without_collections
from ...optional_packages import need
from ...output.folder import OutputFolder
from ...output.in_place import InPlace, finished
from ...output.receipt import read_receipt
from ...plan.options import Options, parse_weights
from ...plan.plan import Plan
from ...plan.planner import make_plan
from ...reports.merge import DryRunReport, MergeReport
from ...settings import Settings
from ...sources.inputs import Mode, doubts, open_inputs
from ...sources.session import Session
from ...storage.filenames import RECORD
from ...storage.reader import xxh3
from ...storage.refs import PathLike
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
    mode: Mode = "whole" if asked.verify_outputs else "brief" if asked.dry_run else "headers"
    plan = _plan(asked, folder.given if routes.local else "OUT", mode, routes.weights(folder))
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
    plan = _plan(asked, IN_PLACE, "local")
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
    if not (receipt := read_receipt(plan.base.root / RECORD)):
        return False
    files = [{path.name: xxh3(path) for path in adapter.files} for adapter in plan.adapters]
    return plan.weights == receipt.weights and files == [merged.files for merged in receipt.adapters]


def _plan(asked: MergeRequest, out: str, mode: Mode, weights: Path | None = None) -> Plan:
    """Open the inputs and decide every output tensor; odd inputs are warned of.

    `out` is the last word of the command line.
    """
    settings, options = asked.settings, asked.options
    strengths = parse_weights(asked.weight, len(asked.adapters))
    checkpoint, opened = open_inputs(
        None if asked.base is None else os.fspath(asked.base),
        asked.adapters,
        asked.session,
        out=out,
        accepted=options.ignore_field,
        mode=mode,
        weights=weights,
    )
    for doubt in doubts(checkpoint, opened):
        settings.warn(doubt)
    return make_plan(checkpoint, opened, strengths, options)


def _carry_out(plan: Plan, folder: OutputFolder | InPlace, asked: MergeRequest) -> MergeReport | DryRunReport:
    """Carry the plan out, with what it needs from the Hub and has for it."""
    if asked.dry_run:
        target = asked.routes.target
        out = folder.given if asked.routes.local or not target else target.repo
        return DryRunReport.of(plan, asked.settings, out=out)
    with without_collections():
        from ...hub.streaming import stream_merge as traffic
        from .pipeline import run_merge
    if isinstance(folder, InPlace):
        return run_merge(plan, folder, asked.settings)
    with traffic(plan, asked.routes, asked.session, folder) as hub, _examiner(plan, asked) as examine:
        return run_merge(plan, folder, asked.settings, hub, examine)


@contextmanager
def _examiner(plan: Plan, asked: MergeRequest) -> Iterator[Examine | None]:
    """What runs the output on sample prompts, where that is asked for."""
    if not asked.verify_outputs:
        yield None
        return
    from ...logits.compare import prepared

    with prepared(plan, asked.settings, (), None) as comparison:
        yield comparison.against
