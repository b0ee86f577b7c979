"""inspect: describe an adapter or a checkpoint by its headers and small files alone."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from typing_extensions import Unpack

from ...adapters import Adapter, Change, Decomposed, Delta, Full, LowRank, Rows, Waived, tensors_of, transform_of
from ...adapters.beside import doubts_of
from ...errors import DoraConvertError, Fault, PlanError, RefError, UnsupportedError, UsageError
from ...formats.detect import adapters_inside, by_tensors, detect, model_weights
from ...options import InspectOptions
from ...output.lineage import doubts
from ...plan.plan import Options, Plan, parse_options
from ...plan.planner import make_plan
from ...reports.checkpoint import CheckpointReport
from ...reports.files import check_file, write_file
from ...reports.inspect import AdapterReport, Landing, Module
from ...sources import Session
from ...sources.inputs import find_adapter, open_base, read_adapter, read_or_refuse
from ...sources.remote_headers import RefListing, look
from ...storage.checkpoint import Checkpoint
from ...storage.refs import HubRef, PathLike, Source, is_stored, local_path, parse_ref, refuse_missing
from .. import takes
from .advice import advise
from .census import census, common, fold
from .magnitudes import doubt_magnitudes


@takes(InspectOptions)
def inspect(
    ref: PathLike, base: PathLike | None = None, **options: Unpack[InspectOptions]
) -> AdapterReport | CheckpointReport:
    """Describe an adapter or a checkpoint by its headers and small files; no weights are downloaded.

    With `base`, the report of an adapter says where each of its tensors would land in the base, and lists
    everything that does not fit. Without `cache`, downloads are removed at the end. `report` is a path for an
    HTML page; an existing file is replaced.

    Raises DoraConvertError for a REF that cannot be read, or is neither.
    """
    ref, base = os.fspath(ref), None if base is None else os.fspath(base)
    if options["report"] is None:
        return _describe(ref, base, options)
    check_file(options["report"])
    report = _describe(ref, base, options)
    from ...reports.inspect_page import render_inspection
    from ...reports.page import command_line

    words = (ref, *(("--base", base) if base is not None else ()))
    page = render_inspection(report, command_line("inspect", words, InspectOptions, options))
    write_file(options["report"], page.encode())
    return report


def _describe(ref: str, base: str | None, options: InspectOptions) -> AdapterReport | CheckpointReport:
    """Return the report on a REF."""
    started = time.monotonic()
    refuse_missing(("REF", ref), ("BASE", base))
    with Session(options["token"], cache=options["cache"]) as session:
        listing = _listed(ref, session)
        source, checkpoint = listing.source, None
        if not detect(source.path):
            checkpoint = _open(listing)
            if checkpoint.config is None and by_tensors(checkpoint.tensors):
                source = find_adapter(ref, session)
        if not checkpoint or source is not listing.source:
            against = None if base is None else open_base(base, "BASE", session, "brief")
            waived = parse_options(options).waived
            words = (str(ref), base)
            return _describe_adapter(source, listing.names, against, waived, words=words, started=started)
        if base is not None:
            swapped = detect(local_path(base, "BASE"))
            hint = shlex.join(["dora-convert", "inspect", base, "--base", ref])
            raise UsageError(f"REF {ref} is a model; --base is for adapters.", hint=hint if swapped else None)
        return census(checkpoint, started)


def _listed(ref: str, session: Session) -> RefListing:
    """Return the files of a REF, with a checkpoint's headers if its weights stay away."""
    if is_stored(ref):
        from ...sources.object_store import look_stored

        return look_stored(ref, session)
    parsed = parse_ref(ref)
    is_file = isinstance(parsed, HubRef) and bool(parsed.file)
    return RefListing(find_adapter(ref, session)) if is_file else look(parsed, "REF", session)


def _open(listing: RefListing) -> Checkpoint:
    """Return a checkpoint; for a folder without weights, raise an error that names the adapters inside."""
    try:
        return listing.checkpoint()
    except RefError:
        if adapters_inside(listing.source.path):
            read_adapter(listing.source)  # raises
        raise


def _describe_adapter(
    source: Source,
    names: Sequence[str],
    base: Checkpoint | None,
    waived: Waived,
    *,
    words: tuple[str, str | None],
    started: float,
) -> AdapterReport:
    adapter, refusal = read_or_refuse(source, waived)
    others = [file for file in adapter.beside if file.fate != "model"]
    own = {*(file.name for file in others), *(path.name for path in adapter.files)}
    models = [name for name in model_weights(names) if name not in own]
    notes = [f"holds a model's weights, too: {', '.join(models[:5])}"] if models else []
    notes += [f"weights beside the adapter: {file.name}, {file.tensors} tensors" for file in others]
    return AdapterReport(
        kind="adapter",
        format=adapter.format,
        maker=adapter.maker,
        method=adapter.kind,
        base=adapter.base,
        revision=adapter.revision,
        task=adapter.task,
        layers=adapter.layers,
        modules=tuple(_module(change, adapter) for change in adapter.changes),
        ignored=dict(adapter.ignored),
        faults=_faults(adapter.faults),
        refused={"message": refusal.message, "hint": refusal.hint, "faults": list(_faults(refusal.faults))}
        if refusal
        else None,
        landing=_landing(base, adapter, refusal) if base else None,
        **advise(adapter, words, refused=refusal is not None),
        **common(source, adapter.tensors.values(), notes, started),
    )


def _module(change: Change, adapter: Adapter) -> Module:
    tensors = tuple(tensors_of(change.update))
    facts: dict[str, Any] = {}
    match change.update:
        case LowRank(start=start, rank=rank, scale=scale, experts=experts) as low:
            method = start.value if start else "AdaLoRA" if adapter.kind == "AdaLoRA" else low.title.partition(",")[0]
            facts = {"rank": rank, "scaling": scale, "experts": experts or None}
        case Decomposed(LowRank(rank=rank, scale=scale)):
            method, facts = "DoRA", {"rank": rank, "scaling": scale, "experts": None}
        case Delta(value, scale):
            method, facts = "bias", {"scaling": scale, "shape": value.shape}
        case Full(value):
            method, facts = "whole", {"shape": value.shape}
        case Rows(value, index):
            method, facts = "rows", {"rows": len(index), "shape": value.shape}
        case other:
            inner = transform_of(other)
            method = (inner or other).title.partition(",")[0]
            facts = {"rank": getattr(inner, "rank", None), "scaling": getattr(inner, "scale", None)}
    if isinstance(given := facts.get("scaling"), float) and not isfinite(given):
        facts["scaling"] = None  # no file and no option says it
    return Module(
        target=change.target,
        kind=fold(change.target),
        method=method,
        what=change.update.title.replace("scaling nan", "scaling unknown"),
        rule=change.rule or None,
        among=change.among,
        bytes=sum(tensor.nbytes for tensor in tensors),
        tensors=tuple(tensor.name for tensor in tensors),
        **facts,
    )


def _faults(faults: Sequence[Fault]) -> tuple[Mapping[str, str], ...]:
    return tuple(fault._asdict() for fault in faults)


def _landing(base: Checkpoint, adapter: Adapter, refusal: DoraConvertError | None) -> Landing:
    plan, error = (None, refusal) if refusal else _try_plan(base, adapter, Options())
    choice = None
    if error and not refusal and base.may_be_quantised:  # a merge needs one more option then, and no other adapter
        plan, decoded = _try_plan(base, adapter, Options(quantised="all"))
        choice, error = (error, None) if plan else (None, decoded)
    if error and not refusal:  # plan the tensors that do fit, if the rest only has no place
        plan, _ = _try_plan(base, adapter, Options(allow_unmatched=True))
    return Landing(
        base=base.source.address,
        fits=error is None,
        message=error.message if error else None,
        hint=error.hint if error else None,
        faults=_faults(error.faults if error else ()),
        ledger=tuple(entry.to_dict() for entry in plan.ledger) if plan else (),
        tensors=plan.counts() if plan else {},
        warnings=(
            *doubts(base, [adapter]),
            *(plan.warnings if plan else adapter.warnings),
            *doubts_of(adapter.beside, adapter.source.name),
            *(doubt_magnitudes(plan) if plan else ()),
            *([f"merge needs one more option: {choice.hint}"] if choice else ()),
        ),
    )


def _try_plan(base: Checkpoint, adapter: Adapter, options: Options) -> tuple[Plan | None, DoraConvertError | None]:
    try:
        return make_plan(base, [adapter], (1.0,), options), None
    except (PlanError, UnsupportedError, UsageError) as error:
        return None, error
