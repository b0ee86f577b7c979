"""verify: compare a merged checkpoint with what base and adapters do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from ..errors import DoraConvertError, UsageError
from ..logits.prompts import gather_prompts
from ..option_table import SUM, combines
from ..options import VerifyOptions
from ..output.lineage import chains
from ..output.receipt import Receipt, read_receipt
from ..plan.plan import Options, Plan, parse_options, parse_weights
from ..plan.planner import left_out, make_plan
from ..reports.files import check_file, write_file
from ..reports.verify import OutputsReport, VerifyReport
from ..settings import Settings, parse_facts, require_extra
from ..sources import Session
from ..sources.inputs import find_adapter, modules_of, open_base, open_inputs, refuse_swapped
from ..sources.prefetch import download_weights
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import RECORD, refuse_changed
from ..storage.refs import PathLike, listed, refuse_missing
from ..torch_import import without_collections
from . import takes

if TYPE_CHECKING:
    from ..cluster.jobs import Cluster


@takes(VerifyOptions)
def verify(
    base: PathLike | None, adapters: PathLike | Sequence[PathLike], merged: PathLike, **options: Unpack[VerifyOptions]
) -> VerifyReport | OutputsReport:
    """Compare what `merged` does with what base and adapters do.

    At the level of weights, every element is compared with the float64 result; `samples` is the number of
    random inputs whose outputs are compared for each module, too. At the level of outputs, base and adapters,
    as PEFT runs them, and `merged` are run on texts: each of `prompt`, the lines of the file `prompts`, or
    built-in ones.

    The report's `verdict` is "agree" or "differ"; DoraConvertError is raised if that cannot be decided.
    Weights and options that are not given are read from a receipt in `merged`. `max_memory` is 160MiB for
    weights, and for outputs the machine's free memory. `report` is a path for an HTML page; an existing file
    is replaced.
    """
    texts = _texts(options)
    if options["cluster"] is not None:
        from .on_cluster import refuse_for_cluster

        refuse_for_cluster(options)
    if options["report"] is not None:
        check_file(options["report"])
    settings = Settings.parse(options)
    with Session(options["token"], cache=options["cache"], notify=settings.notify) as session:
        request = VerifyRequest(
            base=None if base is None else os.fspath(base),
            adapters=listed(adapters),
            merged=os.fspath(merged),
            options=options,
            settings=settings,
            session=session,
        )
        plan, checkpoint = _plan(request)
        report = _compare(plan, checkpoint, request, texts)
        refuse_changed(plan.base.states, checkpoint.states, *(adapter.states for adapter in plan.adapters))
    if options["report"] is not None:
        from ..reports.page import command_line
        from ..reports.verify_page import render_comparison

        refs = (request.base or report.base, *request.adapters, request.merged)
        page = render_comparison(report, command_line("verify", refs, VerifyOptions, options))
        write_file(options["report"], page.encode())
    return report


@dataclass(frozen=True, kw_only=True)
class VerifyRequest:
    """The inputs and options of one comparison, checked."""

    base: str | None
    adapters: Sequence[str]
    merged: str
    options: VerifyOptions
    settings: Settings
    session: Session


def _plan(request: VerifyRequest) -> tuple[Plan, Checkpoint]:
    """Return the plan of the merge, with the options of MERGED's receipt by default; and MERGED."""
    options, session, settings = request.options, request.session, request.settings
    selection = parse_options(options)
    weights = parse_weights(options["weight"], len(request.adapters))
    if request.base is not None:
        refuse_swapped(request.base, request.adapters, request.merged, "verify")
    refuse_missing(("BASE", request.base), *(("ADAPTER", ref) for ref in request.adapters), ("MERGED", request.merged))
    merged = open_base(request.merged, "MERGED", session)
    combination = SUM
    if receipt := _receipt(merged, request):
        if options["method"] == receipt.combination.method and not (options["density"] or options["seed"]):
            options = {**options, "method": None}  # with the receipt's density and seed
        combination = SUM if options["method"] else receipt.combination
        selection, weights = _as_recorded(selection, weights, receipt, request)
    base, adapters = open_inputs(
        request.base,
        request.adapters,
        session,
        out=request.merged,
        verb="verify",
        waived=selection.waived,
        method=options["method"] or (None if combination == SUM else combination.method),
    )
    if combines(options) or len(adapters) > len(request.adapters):
        from ..plan.methods import choose_combination

        combination, weights = choose_combination(options, len(request.adapters), len(adapters), settings.warn)
    selection = replace(selection, combination=combination)
    idle = parse_options(options).check_globs(modules_of(adapters))
    for doubt in (*chains(base, adapters, combination.method), *idle):
        settings.warn(doubt)
    plan = make_plan(base, adapters, weights, selection if selection.quantised else replace(selection, quantised="all"))
    for doubt in (*plan.warnings, *left_out(plan)):
        settings.warn(doubt)
    return plan, merged


def _as_recorded(
    selection: Options, weights: tuple[float, ...], receipt: Receipt, request: VerifyRequest
) -> tuple[Options, tuple[float, ...]]:
    """Return the selection and the weights of the merge: a receipt's, where the request has none of its own."""
    recorded = receipt.options
    if not (request.options["weight"] or selection.include or selection.exclude):
        weights = receipt.weights
        selection = replace(selection, include=recorded.include, exclude=recorded.exclude)
        if words := _flags(receipt):
            request.settings.notify(f"as the receipt of MERGED says: {words}")
    if not selection.facts.given and recorded.facts:
        selection = replace(selection, facts=parse_facts(recorded.facts))
    return (
        replace(
            selection,
            ignore_field=(*selection.ignore_field, *recorded.ignore_field),
            ignore_file=(*selection.ignore_file, *(recorded.ignore_file or ())),
            allow_unmatched=selection.allow_unmatched or receipt.allows_unmatched,
        ),
        weights,
    )


@contextmanager
def _nodes(plan: Plan, merged: Checkpoint, request: VerifyRequest) -> Iterator[Callable[[], Cluster] | None]:
    """Yield the nodes of --cluster, all of which must see the inputs; None for this machine alone."""
    if request.options["cluster"] is None:
        yield None
        return
    from .on_cluster import nodes_that_see

    for checkpoint in (plan.base, merged):
        download_weights(checkpoint, request.session)
    inputs = [plan.base.states, merged.states, *(adapter.states for adapter in plan.adapters)]
    with nodes_that_see(request.options["cluster"], inputs, None, request.settings) as nodes:
        yield nodes


def _texts(options: VerifyOptions) -> tuple[str, ...]:
    """Return the prompts to run models on; UsageError if models cannot be run, or are not to be run."""
    prompt, prompts = options["prompt"], options["prompts"]
    if options["level"] == "outputs":
        require_extra("verify", "--level outputs")
        return gather_prompts(prompt, prompts)
    if prompt or prompts is not None:
        raise UsageError("--prompt and --prompts are of use with --level outputs only.")
    return ()


def _receipt(merged: Checkpoint, request: VerifyRequest) -> Receipt | None:
    """Return MERGED's receipt if these adapters were merged. Missing adapters are refused later."""
    if not (receipt := read_receipt(merged.source.path / RECORD)):
        return None
    try:
        folders = [find_adapter(ref, request.session).path for ref in request.adapters]
    except DoraConvertError:
        return None
    return receipt if receipt.is_of(folders) else None


def _flags(receipt: Receipt) -> str:
    """Return the options of a merge command that differ from the defaults; empty if none does."""
    weights = receipt.weights if any(weight != 1 for weight in receipt.weights) else ()
    options = receipt.options
    words = [f"--weight {weight:g}" for weight in weights]
    words += receipt.combination.words
    words += [f"--include {pattern}" for pattern in options.include]
    words += [f"--exclude {pattern}" for pattern in options.exclude]
    words += [f"--ignore-field {name}" for name in options.ignore_field]
    words += [f"--ignore-file {name}" for name in options.ignore_file or ()]
    words += [f"--{name.replace('_', '-')} {fact}" for name, fact in (options.facts or {}).items()]
    return " ".join([*words, *(["--allow-unmatched"] if receipt.allows_unmatched else [])])


def _compare(
    plan: Plan, merged: Checkpoint, request: VerifyRequest, texts: Sequence[str]
) -> VerifyReport | OutputsReport:
    """Compare weights, or run both models on texts."""
    options, settings, session = request.options, request.settings, request.session
    if options["level"] == "weights":
        with _nodes(plan, merged, request) as nodes:
            with without_collections(numpy=False):
                from ..parity.weights import verify_weights
            from ..plan.quantised import as_dense

            cluster = nodes() if nodes else None
            return verify_weights(plan, as_dense(merged), settings, session, options["samples"], cluster=cluster)
    with without_collections():
        from ..logits.compare import prepared
    for checkpoint in (plan.base, merged):
        download_weights(checkpoint, session)
    limit = None if options["max_memory"] is None else settings.max_memory
    with prepared(plan, settings, texts, limit) as comparison:
        return comparison.against(merged)
