"""Carry a plan out: look at values, fill OUT.partial or continue it, check what was written, publish it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ... import __version__
from ...engine.executor import Run
from ...engine.preflight import doubt_base, scan_adapter
from ...engine.rehearsal import rehearse
from ...engine.resume import entered, settle
from ...engine.run import Hashes, RunOptions, earlier, judge, run, run_key
from ...engine.tensor import Merging
from ...errors import Fault, VerificationError
from ...output import receipt
from ...output.card import card_bytes
from ...output.finished import TensorResult, kept_name
from ...output.output import Output
from ...output.side_files import SideFile, base_files, originals, side_files, with_card
from ...parity.self_check import Checker
from ...plan.plan import Plan
from ...reports.merge import MergeReport
from ...settings import Settings
from ...storage import spool as undo
from ...storage.checkpoint import RECEIPT, RECORD, Checkpoint, open_checkpoint
from ...storage.digests import sha256
from ...storage.refs import local_source
from ...storage.spool import Part, Spool
from ...undo.keep import keeper

if TYPE_CHECKING:
    from ...hub.streaming import HubStreaming
    from ...reports.verify import OutputsReport

    Examine = Callable[[Checkpoint], OutputsReport]
    """Runs what was written, and compares it with base and adapters."""


def produce(
    plan: Plan,
    folder: Output,
    settings: Settings,
    hub: HubStreaming | None = None,
    examine: Examine | None = None,
) -> MergeReport:
    """Run a merge's plan and publish the result if `examine` finds no difference; on the Hub, too, with `hub`.

    Raises UsageError for a device or a memory budget that will not do, NumericalError for NaN, Inf and overflow,
    OutputError for a disk that does not take the result, VerificationError when a check fails. OUT does not exist then.
    """
    spec = settle(plan.memory, settings)
    hashes = [scan_adapter(adapter) for adapter in plan.adapters]
    seen = _look_at_base(plan, settings)
    files = side_files(plan)
    room = hub.room(plan) if hub else folder.room(plan)
    folder.check_space(room + 2 * plan.undo_bytes + sum(file.nbytes for file in files))
    make = partial(Merging, prove=plan.options.exact, observe=partial(keeper, plan))
    with entered(folder):
        key = run_key(plan, folder, hashes, spec)
        before = earlier(folder, plan, key)
        if folder.in_place and not before:
            rehearse(plan, settings, spec, make)
        if hub:
            hub.begin(folder.partial)
        options = RunOptions(make, Checker if settings.verify else None, hub, _copied(plan, folder))
        done = run(plan, folder, settings, spec, (key, before), options)
        if not seen:
            _look_at_base(plan, settings)
        verdict = judge(plan, done.progress.done) if settings.verify else None
        if _same(plan, done.progress.done):
            settings.warn("the adapter changes nothing: every element is as it was in the base")
        card = card_bytes(plan, settings.base_model, verdict.rows() if verdict else ())
        files = with_card(files, card)
        _write_files(plan, folder, done, files, hashes)
        outputs = _examined(folder, examine).to_dict() if examine else None
        pushed = hub.finish(card, f"Merge with dora-convert {__version__}") if hub else None
        away = pushed.url if pushed and hub and not hub.local else None
        ended: dict[str, Any] = {
            "written": done.written,
            "resumed": bool(before and before.records),
            "outputs": outputs,
        }
        report = MergeReport.of(
            plan, settings, out=away or folder.given, spec=spec, verdict=verdict, pushed=pushed, **ended
        )
        if away:
            folder.discard()
        else:
            spare = [] if plan.options.undo != "none" else [f"{RECORD}/{undo.NAME}"]
            folder.publish(report.to_dict(), spare)
    return report


def _copied(plan: Plan, folder: Output) -> set[str]:
    """What an exact record has the hashes of besides; in place, nothing else is touched."""
    whole = plan.options.exact and not folder.in_place
    return {item.name for item in plan.items if whole and item.verbatim}


def _look_at_base(plan: Plan, settings: Settings) -> bool:
    """Warn where the base does not look like the adapter's; False where its weights are not here."""
    if not plan.base.is_here:
        return False
    if doubt := doubt_base(plan):
        settings.warn(doubt)
    return True


def _examined(folder: Output, examine: Examine) -> OutputsReport:
    """What running the output says; VerificationError where that differs, which leaves OUT.partial as it is."""
    found = examine(open_checkpoint(local_source(folder.partial)))
    if found.verdict != "agree":
        raise VerificationError(
            "The merged model's outputs are not those of base and adapter.",
            faults=[Fault("outputs", problem) for problem in found.problems],
            hint=f"what was written is in {folder.partial}; the same command compares it again",
        )
    return found


def _same(plan: Plan, done: Mapping[str, TensorResult]) -> bool:
    """Whether every tensor that adapters had a part in holds the base's bytes."""
    return all(
        item.dtype == item.base.dtype and done[item.name].base_hash == done[item.name].written_hash
        if item.base and item.name in done and not item.added
        else False
        for item in plan.items
        if item.changed
    )


def _write_files(plan: Plan, folder: Output, run: Run, files: Sequence[SideFile], hashes: Hashes) -> None:
    """Everything beside the weights: side files, the undo record, the receipt."""
    for file in files:
        folder.put(file.name, file.source)
    if plan.options.undo != "none":
        with closing(Spool(folder.record / undo.SPOOL, run.progress.spooled)) as spool:
            spool.lay_out(
                [*_kept(plan, run), *_originals(plan, files, spool)], folder.path(f"{RECORD}/{undo.NAME}")
            )
    proofs = {name: sha256(path) for name, path in base_files(plan.base).items()}
    computed = {"device": run.spec.device.type, "compute_dtype": run.spec.compute_name}
    written = receipt.receipt_bytes(
        plan, run.progress.done, hashes, files, proofs, computed, torch.__version__
    )
    folder.put(f"{RECORD}/{RECEIPT}", written)


def _kept(plan: Plan, run: Run) -> list[Part]:
    """What workers have spooled, in the plan's order."""
    names = [item.name for item in plan.items if not item.verbatim] + [
        kept_name(tensor) for tensor in plan.lost
    ]
    return [part for name in names for part in run.progress.done[name].parts]


def _originals(plan: Plan, files: Sequence[SideFile], spool: Spool) -> list[Part]:
    """The base's side files that OUT does not hold as they were, as parts of the undo record."""
    parts = []
    for name, path in originals(plan.base, files).items():
        data = path.read_bytes()
        parts.append(Part(f"file/{name}", "U8", (len(data),), (spool.add(data),)))
    return parts
