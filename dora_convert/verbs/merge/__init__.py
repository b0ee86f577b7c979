"""merge: fold adapters into a base, from the request over the plan to the published output."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from ...errors import UsageError
from ...option_table import combines
from ...options import MergeOptions
from ...output.folder import OutputFolder
from ...output.side_files import tokenizer_files
from ...plan.plan import Options, Plan, parse_options, parse_weights
from ...plan.planner import left_out, make_plan
from ...reports.merge import DryRunReport, MergeReport
from ...settings import Settings, require_extra
from ...sources import Session
from ...sources.inputs import Mode, modules_of, open_inputs, strangers, unused
from ...storage.filenames import INCOMING
from ...storage.refs import QUANTISED_NAME, PathLike, is_stored, listed, stored_address
from ...torch_import import collections_paused, without_collections
from .. import takes

if TYPE_CHECKING:
    from ...adapters import Adapter
    from ...hub.streaming import HubStreaming
    from ...hub.target import PushTarget
    from ...plan.stored_numbers import Questions
    from ...storage.checkpoint import Checkpoint
    from ..on_cluster import Ask
    from .pipeline import Examine

EARLY_BYTES = 1 << 25
"""Smaller outputs gain nothing if they are begun early."""


@takes(MergeOptions)
def merge(
    base: PathLike | None,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike | None = None,
    **options: Unpack[MergeOptions],
) -> MergeReport | DryRunReport:
    """Fold adapters into a base checkpoint: W' = W + Σ wᵢ·(applyᵢ(W) − W), each element rounded once.

    `base` and each of `adapters` is a folder or a Hub repo; a base of None is the one that the first adapter
    names. `out` is not given with `in_place` or `no_local`. `on_progress` is called with bytes done and in
    all, from worker threads. docs/cli.md explains the options. Raises DoraConvertError, and then leaves
    nothing under `out`.
    """
    if options["cluster"] is not None:
        from ..on_cluster import refuse_for_cluster

        refuse_for_cluster(options)
    if options["in_place"] or options["allow_lossy"]:
        from ..in_place import refuse_options

        refuse_options(options)
    undo = options["undo"] or _usual_undo(options)
    selection = replace(parse_options(options), undo=undo)
    target = _target(options)
    settings = Settings.parse(options)
    cache = options["cache"] and (not options["no_local"] or options["cluster"] is not None)
    with Session(
        options["token"], cache=cache, notify=settings.notify, follow_links=options["follow_links"]
    ) as session:
        request = MergeRequest(
            base=base,
            adapters=listed(adapters),
            out=stored_address(out) if out is not None and is_stored(out) else out,
            options=options,
            selection=selection,
            settings=settings,
            session=session,
            target=target,
        )
        if options["in_place"]:
            return _merge_in_place(request)
        with _connecting(request) as ask:
            return _merge_beside(request, ask)


def _usual_undo(options: MergeOptions) -> str:
    """Return the record that is kept if the caller does not say: none of a base that is not in the output."""
    if options["base_as"]:
        return "none"
    return "exact" if options["in_place"] and not options["allow_lossy"] else "norms"


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """The inputs and options of one merge, checked."""

    base: PathLike | None
    adapters: Sequence[str]
    out: PathLike | None
    options: MergeOptions
    selection: Options
    """The options that decide the plan."""
    settings: Settings
    session: Session
    target: PushTarget | None
    """The repo on the Hub that the result is uploaded to."""


def _target(options: MergeOptions) -> PushTarget | None:
    """Return the repo that the options name; UsageError for options without --push-to-hub."""
    names = ("push_to_hub", "private", "create_pr", "commit_message", "no_local")
    if not any(options[name] for name in names):  # type: ignore[literal-required]
        return None
    from ...hub.target import PushTarget

    return PushTarget.parse(options, local=not options["no_local"])


def _merge_beside(request: MergeRequest, ask: Ask | None) -> MergeReport | DryRunReport:
    """Write OUT beside the base, or only on the Hub; `ask` asks the nodes of a cluster that write it."""
    options, target = request.options, request.target
    if options["verify_outputs"] and options["no_local"]:
        raise UsageError("--no-local keeps nothing that --verify-outputs could run.", hint="name an OUT")
    folder = OutputFolder(_folder(request), overwrite=options["overwrite"])
    if options["verify_outputs"]:
        require_extra("verify", "--verify-outputs")
    folder.check()
    out = "OUT" if options["no_local"] else str(request.out) if is_stored(request.out) else folder.given
    weights = None if request.session.cache else folder.state / INCOMING
    later: Questions | None = None if options["dry_run"] else []
    plan = make_request_plan(request, out, _mode(request), weights, later=later)
    folder.refuse_inside([plan.base.source.path, *(adapter.source.path for adapter in plan.adapters)])
    if options["dry_run"]:
        return DryRunReport.of(plan, request.settings, out=out if target is None or target.local else target.repo)
    away = target.address if target and not target.local else str(request.out) if is_stored(request.out) else None
    with _begun_early(request, plan, folder), ask(plan, away or folder.out) if ask else nullcontext() as nodes:
        with without_collections(numpy=bool(options["verify_outputs"] or options["base_as"])):
            from .pipeline import answers_differ, run_merge
        if later and answers_differ(later):
            plan = make_request_plan(request, out, _mode(request), weights)
        with _streaming(request, plan, folder) as hub, _examiner(request, plan) as examine:
            return run_merge(plan, folder, request.settings, hub, examine, executor=nodes() if nodes else None)


def _begun_early(request: MergeRequest, plan: Plan, folder: OutputFolder) -> AbstractContextManager[None]:
    """Begin to fill the output while torch is imported, if all is on this machine and that gains anything."""
    if request.target or is_stored(request.out) or plan.bytes_out < EARLY_BYTES:
        return nullcontext()
    from .early import begun_early

    return begun_early(folder, plan)


def _folder(request: MergeRequest) -> PathLike:
    """Return OUT, or the folder that shards pass through on their way to the Hub."""
    if is_stored(request.out):
        from .stores import folder_for

        return folder_for(str(request.out), [request.base, *request.adapters], request.options)
    if request.target and not request.target.local:
        return request.target.transit_folder(request.out, [str(request.base), *request.adapters])
    if request.out is None:
        raise UsageError("merge needs OUT, or --in-place, or --push-to-hub REPO_ID --no-local.")
    return request.out


def _merge_in_place(request: MergeRequest) -> MergeReport | DryRunReport:
    """Change the base itself; first publish the files that an interrupted run has staged."""
    from ...output.in_place import finished
    from .. import in_place

    options, settings = request.options, request.settings
    base = in_place.refuse_out(request.base, "BASE", request.out)
    if request.target or options["verify_outputs"]:
        raise UsageError(
            "--in-place goes neither with --push-to-hub nor with --verify-outputs.",
            hint="dora-convert push, or dora-convert verify --level outputs, afterwards",
        )
    in_place.refuse_lossy(request.selection.undo, options)
    if report := finished(base, "merge", request.adapters, settings):
        return MergeReport.read(report)
    with in_place.last_word(request.adapters):
        plan = make_request_plan(request, "--in-place", "local")
    place = in_place.open_place(plan)
    in_place.refuse_merged(plan, place)
    if options["dry_run"]:
        return DryRunReport.of(plan, settings, out=place.given)
    with without_collections(numpy=False):
        from .pipeline import run_merge
    return run_merge(plan, place, settings)


@collections_paused()
def make_request_plan(
    request: MergeRequest, out: str, mode: Mode, weights: Path | None = None, *, later: Questions | None = None
) -> Plan:
    """Open the inputs and decide every output tensor; `out` is the command line's last word, for hints."""
    checkpoint, adapters = open_inputs(
        None if request.base is None else os.fspath(request.base),
        request.adapters,
        request.session,
        out=out,
        waived=request.selection.waived,
        mode=mode,
        weights=weights,
        method=request.options["method"],
    )
    if checkpoint.gguf:
        from ...plan.quantised_config import undo_of_gguf

        request = replace(request, selection=replace(request.selection, undo=undo_of_gguf(request.options["undo"])))
    return plan_inputs(request, checkpoint, adapters, later)


def plan_inputs(
    request: MergeRequest, checkpoint: Checkpoint, adapters: Sequence[Adapter], later: Questions | None = None
) -> Plan:
    """Warn about oddities of opened inputs, and decide every output tensor."""
    settings, selection = request.settings, request.selection
    if len(adapters) > len(request.adapters) or combines(request.options):
        from .several import combined

        selection, strengths = combined(
            request.options, len(request.adapters), checkpoint, adapters, selection=selection, warn=settings.warn
        )
    else:
        strengths = parse_weights(request.options["weight"], len(adapters))
    if strangers(checkpoint, adapters) or len({adapter.files for adapter in adapters}) < len(adapters):
        from ...output.lineage import doubts

        for doubt in doubts(checkpoint, adapters, selection.combination.method):
            settings.warn(doubt)
    for note in (*unused(checkpoint, adapters), *selection.check_globs(modules_of(adapters))):
        settings.warn(note)
    of_quantised = any(QUANTISED_NAME.search(adapter.base or "") for adapter in adapters)
    if not checkpoint.may_be_quantised and (selection.quantised or of_quantised):
        from .dense_base import tell_of_dense_base

        tell_of_dense_base(checkpoint, adapters, selection.quantised, settings)
    plan = make_plan(checkpoint, adapters, strengths, selection, later)
    for doubt in (*plan.warnings, *left_out(plan)):
        settings.warn(doubt)
    if selection.legacy_config and plan.config is None:
        settings.warn(
            "--legacy-config changes nothing: config.json has no rope_parameters, or the older fields already"
        )
    if any(tokenizer_files(adapter.source.path) for adapter in adapters):
        from ...output.tokenizer import tokens_without_rows

        for doubt in tokens_without_rows(plan):
            settings.warn(doubt)
    return plan


def _mode(request: MergeRequest) -> Mode:
    """Return how much of a base on the Hub is downloaded before the plan is made."""
    if request.options["verify_outputs"]:
        return "whole"
    if request.options["dry_run"]:
        return "brief"
    return "ranges" if is_stored(request.base) else "headers"


def _streaming(request: MergeRequest, plan: Plan, folder: OutputFolder) -> AbstractContextManager[HubStreaming | None]:
    """Return the download of the base's weights and the upload of shards, while the plan runs."""
    if plan.base.is_here and not request.target and not is_stored(request.out):
        return nullcontext()
    if is_stored(request.out) or plan.base.source.url:
        from .stores import streaming_for

        return streaming_for(request.out, request.options, plan, folder)
    from ...hub.streaming import stream_merge

    weights = None if request.session.cache else folder.state / INCOMING
    nodes = request.options["cluster"] is not None
    return stream_merge(plan, request.target, request.session, folder, weights=weights, nodes=nodes)


def _connecting(request: MergeRequest) -> AbstractContextManager[Ask | None]:
    """Connect to --cluster, whose processes start while the plan is made; None for this machine alone."""
    if request.options["cluster"] is None or request.options["dry_run"]:
        return nullcontext()
    from ..on_cluster import merging_nodes

    return merging_nodes(request.options["cluster"], request.settings)


@contextmanager
def _examiner(request: MergeRequest, plan: Plan) -> Iterator[Examine | None]:
    """Yield a function that runs the output on sample prompts, if --verify-outputs asks for it."""
    if not request.options["verify_outputs"]:
        yield None
        return
    from ...logits.compare import prepared

    with prepared(plan, request.settings, (), None) as comparison:
        yield comparison.against
