"""Run a merge's plan: check the inputs, write the tensors, write the files beside them, publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...engine.precision import doubt_zeros, exact_arithmetic, scan_adapter
from ...engine.run import Executor, Hashes, Run, choose_compute, resume_plan, run
from ...engine.tensor import MergeStart
from ...errors import Fault, VerificationError
from ...output.card import card_bytes, inherited, works_of
from ...output.finished import TensorResult, Verdict, judge, kept_name
from ...output.output import input_states
from ...output.receipt import new_receipt
from ...output.side_files import SideFile, adopted_sets, base_files, originals, side_files, with_card
from ...parity.self_check import SelfCheck
from ...plan.plan import Plan
from ...reports.merge import MergeReport
from ...settings import Settings, __version__
from ...storage.checkpoint import Checkpoint, open_checkpoint
from ...storage.filenames import RECEIPT, RECORD, SPOOL, UNDO, refuse_changed
from ...storage.reader import sha256
from ...storage.refs import local_source
from ...storage.spool import Spool, SpooledTensor
from ...torch_import import collections_paused

if TYPE_CHECKING:
    from ...engine.precision import ComputeSpec
    from ...engine.protocols import Observe
    from ...engine.tensor import Combine
    from ...hub.streaming import HubStreaming
    from ...output.output import Output
    from ...plan.stored_numbers import Questions
    from ...reports.verify import OutputsReport

Examine = Callable[[Checkpoint], "OutputsReport"]
"""Runs the written model, and compares its outputs with those of base and adapters."""


def answers_differ(questions: Questions) -> bool:
    """Answer what had to wait for torch; return True if an answer is not the usual one."""
    with exact_arithmetic():  # one thread: a second one would spin longer than it works
        return any(question() for question in questions)


def run_merge(
    plan: Plan,
    output: Output,
    settings: Settings,
    hub: HubStreaming | None = None,
    examine: Examine | None = None,
    executor: Executor | None = None,
) -> MergeReport:
    """Run a merge's plan, and publish the result if `examine` finds no difference; with `hub`, push it, too.

    `executor` writes the tensors; None for threads of this process.

    Raises UsageError for an unusable device or memory budget, NumericalError for NaN, Inf and overflow,
    OutputError for a disk that cannot hold the result, VerificationError if a check fails. OUT does not exist
    then.
    """
    with exact_arithmetic():  # one thread: a second one would only wait, and take its processor from other work
        plan, spec, hashes = check_adapters(plan, settings, executor)
    files = side_files(plan)
    for adopted in () if plan.base.is_bare else adopted_sets(plan):
        (settings.warn if adopted.rivals else settings.notify)(adopted.notice(plan.base))
    if plan.base.gguf:
        from .gguf_notices import tell_of_gguf

        tell_of_gguf(plan.base, files, settings)
    fields = inherited(works_of(plan))
    if fields.notice:
        settings.notify(fields.notice)
    with exact_arithmetic():
        seen = _look_at_base(plan, settings)
    needed = hub.room(plan) if hub else output.bytes_needed(plan)
    output.check_space(needed + 2 * plan.undo_bytes + sum(file.nbytes for file in files))
    inputs = input_states(output, [plan.base], plan.adapters)
    with output.entered(*inputs):
        done = _write_tensors(plan, output, settings, hub, spec=spec, hashes=hashes, executor=executor)
        results = done.progress.done
        if not seen:
            _look_at_base(plan, settings)
        verdict = judge(plan, results) if settings.verify else None
        _tell_loss(plan, verdict, settings)
        if _is_unchanged(plan, results):
            settings.warn("the adapter changes nothing: every element is as in the base")
        card = card_bytes(plan, settings.base_model, fields, verdict.rows() if verdict else ())
        _write_files(done, output, with_card(files, card), hashes)
        outputs = _examine(output, examine).to_dict() if examine else None
        refuse_changed(*inputs)
        return _publish(done, output, hub, files, card=card, verdict=verdict, outputs=outputs)


@collections_paused()
def check_adapters(
    plan: Plan, settings: Settings, executor: Executor | None = None
) -> tuple[Plan, ComputeSpec, Hashes]:
    """Choose the device, refuse NaN and Inf in the adapters, and warn of odd values.

    Returns the plan in the device's blocks, the device, and the hashes of the adapters' files.
    """
    spec = choose_compute(plan.memory, settings, executor)
    if spec.staged:
        from ...engine.device_plan import cut_for

        plan = cut_for(plan, spec, settings)
    hashes = [scan_adapter(adapter) for adapter in plan.adapters]
    for doubt in filter(None, map(doubt_zeros, plan.adapters)):
        settings.warn(doubt)
    return plan, spec, hashes


LOSS = 0.1
"""A share of the change lost above this is warned of."""


def _tell_loss(plan: Plan, verdict: Verdict | None, settings: Settings) -> None:
    """Say how much of the change the codes of a quantised output have lost."""
    titles = sorted({getattr(item.source, "scheme").title for item in plan.items if item.parts})  # noqa: B009
    if not titles:
        return
    lost = verdict.lost if verdict else None
    if lost is None:
        settings.warn(f"written back as {', '.join(titles)}; without the check its loss is not known")
    elif lost > LOSS:
        settings.warn(
            f"written back as {', '.join(titles)}: {lost:.0%} of the change is lost to rounding; "
            "--dequantize or --dequantize-touched keeps it"
        )
    else:
        settings.notify(f"written back as {', '.join(titles)}: {lost:.1%} of the change is lost to rounding")


@collections_paused()
def _look_at_base(plan: Plan, settings: Settings) -> bool:
    """Warn of a base that does not look like the adapter's; return False if the weights are not local yet."""
    if plan.base.is_here and any(edit.decomposed for item in plan.items for edit in item.edits):
        from ...engine.doubts import check_magnitudes

        if doubt := check_magnitudes(plan):
            settings.warn(doubt)
    return plan.base.is_here


def _write_tensors(
    plan: Plan,
    output: Output,
    settings: Settings,
    hub: HubStreaming | None,
    *,
    spec: ComputeSpec,
    hashes: Hashes,
    executor: Executor | None,
) -> Run:
    """Write every tensor, from the start or from an unfinished run."""
    maker = MergeStart(
        prove=plan.options.exact, observe=_observe(plan), combine=_combine(plan), memory=settings.memory_each
    )
    key, unfinished = resume_plan(output, plan, hashes, spec)
    if output.in_place and not unfinished:
        from ...engine.rehearsal import rehearse

        rehearse(plan, settings, spec, maker)
    return run(
        plan,
        output,
        settings,
        key=key,
        unfinished=unfinished,
        check=partial(SelfCheck, memory=settings.memory_each) if settings.verify else None,
        hub=hub,
        spec=spec,
        maker=maker,
        executor=executor,
        hashed={item.name for item in plan.items if item.verbatim},
    )


@collections_paused()
def _write_files(done: Run, output: Output, files: Sequence[SideFile], hashes: Hashes) -> None:
    """Write everything beside the weights: side files, the undo record, the receipt."""
    plan, results, spec = done.plan, done.progress.done, done.spec
    for file in files:
        output.put(file.name, file.source)
    hashed: dict[str, str] = {}
    if plan.options.undo != "none":
        with closing(Spool(output.state / SPOOL, done.progress.spooled)) as spool:
            parts = [*_kept(plan, results), *_originals(plan, files, spool)]
            hashed = spool.lay_out(parts, output.path(f"{RECORD}/{UNDO}"))
    proofs = {name: sha256(path) for name, path in base_files(plan.base).items()}
    computed = {"device": spec.device.type, "compute_dtype": spec.compute_name, "torch": torch.__version__}
    receipt = new_receipt(plan, results, hashes, files, base_files=proofs, undo_record=hashed, computed=computed)
    output.put(f"{RECORD}/{RECEIPT}", receipt.to_bytes())


@collections_paused()
def _publish(
    done: Run,
    output: Output,
    hub: HubStreaming | None,
    files: Sequence[SideFile],
    *,
    card: bytes,
    verdict: Verdict | None,
    outputs: Any,
) -> MergeReport:
    """Commit to the Hub if asked, give the output its final name, and return the report."""
    plan = done.plan
    pushed = hub.finish(card, f"Merge with dora-convert {__version__}") if hub else None
    away = pushed.url if pushed and hub and not hub.local else None
    report = MergeReport.of(
        plan, done.settings, done, out=away or output.given, verdict=verdict, pushed=pushed, outputs=outputs
    )
    if away:
        output.discard()
    else:
        stale = [] if plan.options.undo != "none" else [f"{RECORD}/{UNDO}"]
        output.publish(report.to_dict, stale + sorted(base_files(plan.base).keys() - {file.name for file in files}))
    return report


def _observe(plan: Plan) -> Observe | None:
    """Return the starter of undo keepers; None if an unmerge needs the output alone."""
    if not plan.undo_bytes:
        return None
    from ...undo.keep import UndoKeepers

    return UndoKeepers(plan)


def _combine(plan: Plan) -> Combine | None:
    """Return what combines edits in another way than a sum; None if no tensor needs it."""
    if not any(item.combination for item in plan.items):
        return None
    from ...engine.combine import Combiner

    return Combiner


def _examine(output: Output, examine: Examine) -> OutputsReport:
    """Compare the model's outputs; a difference raises VerificationError and leaves OUT.partial as it is."""
    report = examine(open_checkpoint(local_source(output.partial)))
    if report.verdict != "agree":
        raise VerificationError(
            "The merged model's outputs are not those of base and adapter.",
            faults=[Fault("outputs", problem) for problem in report.problems],
            hint=f"the result stays in {output.partial}; rerun the same command to compare it again",
        )
    return report


def _is_unchanged(plan: Plan, done: Mapping[str, TensorResult]) -> bool:
    """Return True if every tensor that adapters changed holds the base's bytes."""
    return all(
        item.base is not None
        and item.name in done
        and not item.added
        and item.dtype == item.base.dtype
        and done[item.name].base_hash == done[item.name].written_hash
        for item in plan.items
        if item.changed
    )


def _kept(plan: Plan, done: Mapping[str, TensorResult]) -> list[SpooledTensor]:
    """Return the parts of the undo record that workers spooled, in the plan's order."""
    names = [item.name for item in plan.items if not item.verbatim]
    names += [kept_name(tensor) for tensor in plan.lost]
    return [part for name in names for part in done[name].parts]


def _originals(plan: Plan, files: Sequence[SideFile], spool: Spool) -> list[SpooledTensor]:
    """Spool the base's side files that OUT does not hold unchanged, as parts of the undo record."""
    return [spool.add_file(path, f"file/{name}") for name, path in originals(plan.base, files).items()]
