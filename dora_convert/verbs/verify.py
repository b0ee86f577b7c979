"""verify: whether a merged checkpoint does what base and adapters do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import DoraConvertError, UsageError
from ..lazy_torch import without_collections
from ..logits.prompts import gather_prompts
from ..optional_packages import need
from ..plan.options import Options, parse_options, parse_weights
from ..plan.plan import Plan
from ..plan.planner import make_plan
from ..reports.html import check_page, write_page
from ..reports.verify import OutputsReport, VerifyReport
from ..settings import MAX_MEMORY, Settings, chosen
from ..sources.inputs import find_adapter, open_base, open_inputs, refuse_swapped
from ..sources.prefetch import download_weights as bring_weights
from ..sources.download import fetch
from ..formats.detect import wanted_of_adapter
from ..sources.inputs import refuse_swapped
from ..storage.spool import gather
from ..sources.prefetch import download_weights
from ..sources.remote_headers import open_far
from ..sources.session import Session, open_session
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import RECORD
from ..storage.refs import PathLike, listed

if TYPE_CHECKING:
    from ..output.receipt import Receipt

LEVELS = "weights", "outputs"


def verify(
    base: PathLike | None,
    adapters: PathLike | Sequence[PathLike],
    merged: PathLike,
    *,
    level: str = "weights",
    weight: Sequence[float] = (),
    samples: int = 8,
    prompt: Sequence[str] = (),
    prompts: PathLike | None = None,
    device: str = "auto",
    max_memory: str | int | None = None,
    workers: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unmatched: bool = False,
    ignore_field: Sequence[str] = (),
    cache: bool = True,
    token: str | None = None,
    report: PathLike | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> VerifyReport | OutputsReport:
    """Whether `merged` does what base and adapters do.

    At the level of weights, every element is compared with the float64 result; `samples` is the number of random inputs
    whose outputs are compared for each module, too. At the level of outputs, base and adapters, as PEFT runs them, and
    `merged` are run on texts: each of `prompt`, the lines of the file `prompts`, or built-in ones.

    The report's `verdict` is "agree" or "differ"; DoraConvertError is raised where that cannot be decided. Weights and
    options that are not given are those that a receipt in `merged` has. `max_memory` is 160MiB for weights, and for
    outputs what the machine has. `report` is a path for an HTML page; a file there is replaced.
    """
    chosen(level, dict.fromkeys(LEVELS), "--level")
    texts = _texts(level, prompt, prompts)
    options = parse_options("auto", "auto", None, "none", include, exclude, allow_unmatched, ignore_field)
    if report is not None:
        check_page(report)
    named, held = None if base is None else os.fspath(base), MAX_MEMORY if max_memory is None else max_memory
    told = (device, "auto", held, workers, True, None, on_progress, on_notice)
    settings = Settings.parse(*told, token=token, cache=cache)
    with open_session(token, cache=cache, notify=settings.notify) as session:
        plan, made = _gather(named, listed(adapters), os.fspath(merged), weight, options, settings, session)
        limit = None if max_memory is None else settings.max_memory
        running = None if level == "weights" else (texts, limit)
        found = _compared(plan, made, settings, session, samples, running)
    if report is not None:
        write_page(found, report)
    return found


def _gather(
    base: str | None,
    refs: Sequence[str],
    where: str,
    weight: Sequence[float],
    options: Options,
    settings: Settings,
    session: Session,
) -> tuple[Plan, Checkpoint]:
    """What a merge would make, of what a receipt in MERGED says where the caller does not; and MERGED."""
    weights = parse_weights(weight, len(refs))
    if base is not None:
        refuse_swapped(base, refs, where, "verify")
    made = open_base(where, "MERGED", session)
    if receipt := _receipt(made, refs, session):
        options = replace(
            options,
            ignore_field=(*options.ignore_field, *receipt.options.ignore_field),
            allow_unmatched=options.allow_unmatched or receipt.allows_unmatched,
        )
        if not (weight or options.include or options.exclude):
            chosen, weights = receipt.options, receipt.weights
            options = replace(options, include=chosen.include, exclude=chosen.exclude)
            if receipt.flags:
                settings.notify(f"as the receipt of MERGED says: {receipt.flags}")
    accepted = options.ignore_field
    checkpoint, opened = open_inputs(base, refs, session, out=where, verb="verify", accepted=accepted)
    return make_plan(checkpoint, opened, weights, options), made


def _texts(level: str, prompt: Sequence[str], prompts: PathLike | None) -> tuple[str, ...]:
    """A caller's prompts, where they are of use; and whether models can be run at all."""
    if level == "outputs":
        need("verify", "--level outputs")
        return gather_prompts([prompt] if isinstance(prompt, str) else prompt, prompts)
    if prompt or prompts is not None:
        raise UsageError("--prompt and --prompts are of use with --level outputs only.")
    return ()


def _receipt(made: Checkpoint, refs: Sequence[str], session: Session) -> Receipt | None:
    """Return the receipt of MERGED, if these adapters were merged. Missing adapters are refused later."""
    from ..output.receipt import read_receipt

    if not (receipt := read_receipt(made.source.path / RECORD)):
        return None
    try:
        paths = [find_adapter(ref, session).path for ref in refs]
    except DoraConvertError:
        return None
    return receipt if receipt.is_of(paths) else None


def _compared(
    plan: Plan,
    made: Checkpoint,
    settings: Settings,
    session: Session,
    samples: int,
    running: tuple[Sequence[str], int | None] | None,
) -> VerifyReport | OutputsReport:
    """Weights compared; or what models say, where `running` holds prompts and a limit of memory."""
    with without_collections():
        from ..parity.weights import verify_weights

        if running:
            from ..logits.compare import prepared
    if not running:
        return verify_weights(plan, made, settings, session, samples)
    for each in (plan.base, made):
        download_weights(each, session)
    with prepared(plan, settings, *running) as comparison:
        return comparison.against(made)
