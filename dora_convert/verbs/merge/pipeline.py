"""Run a merge's plan: check the inputs, write the tensors, write the files beside them, publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ... import __version__
from ...engine.executor import Run
from ...engine.preflight import doubt_base, scan_adapter
from ...engine.run import Hashes, RunOptions, choose_compute, entered, input_states, judge, resume_plan, run, run_key
from ...engine.tensor import MergeMaker
from ...errors import Fault, VerificationError
from ...output.card import card_bytes
from ...output.finished import TensorResult, Verdict, kept_name
from ...output.receipt import new_receipt
from ...output.side_files import SideFile, base_files, originals, side_files, with_card
from ...parity.self_check import SelfCheck
from ...plan.plan import Plan
from ...reports.merge import MergeReport
from ...settings import Settings
from ...storage.changes import refuse_changed
from ...storage.checkpoint import Checkpoint, open_checkpoint
from ...storage.filenames import RECEIPT, RECORD, SPOOL, UNDO
from ...storage.journal import UnfinishedRun
from ...storage.reader import sha256
from ...storage.refs import local_source
from ...storage.spool import Spool, SpooledTensor

if TYPE_CHECKING:
    from ...engine.precision import ComputeSpec
    from ...engine.tensor import Observe
    from ...hub.streaming import HubStreaming
    from ...output.output import Output
    from ...reports.verify import OutputsReport

Examine = Callable[[Checkpoint], "OutputsReport"]
"""Runs the written model, and compares its outputs with those of base and adapters."""


def run_merge(
    plan: Plan, output: Output, settings: Settings, hub: HubStreaming | None = None, examine: Examine | None = None
) -> MergeReport:
    """Run a merge's plan, and publish the result if `examine` finds no difference; with `hub`, push it, too.

    Raises UsageError for an unusable device or memory budget, NumericalError for NaN, Inf and overflow,
    OutputError for a disk that cannot hold the result, VerificationError if a check fails. OUT does not exist
    then.
    """
    spec = choose_compute(plan.memory, settings)
    hashes = [scan_adapter(adapter) for adapter in plan.adapters]
    files = side_files(plan)
    merge = _Merge(plan, output, settings, spec=spec, hashes=hashes, hub=hub)
    merge.look_at_base()
    needed = hub.room(plan) if hub else output.bytes_needed(plan)
    output.check_space(needed + 2 * plan.undo_bytes + sum(file.nbytes for file in files))
    inputs = input_states(output, [plan.base], plan.adapters)
    with entered(output, *inputs):
        done, unfinished = merge.write_tensors()
        merge.look_at_base()
        verdict = judge(plan, done.progress.done) if settings.verify else None
        if _is_unchanged(plan, done.progress.done):
            settings.warn("the adapter changes nothing: every element is as in the base")
        card = card_bytes(plan, settings.base_model, verdict.rows() if verdict else ())
        merge.write_files(with_card(files, card), done)
        outputs = _examine(output, examine) if examine else None
        refuse_changed(*inputs)
        return merge.publish(card, done, unfinished, verdict, outputs)


@dataclass
class _Merge:
    """One merge on its way from the plan to the published output."""

    plan: Plan
    output: Output
    settings: Settings
    spec: ComputeSpec
    hashes: Hashes
    hub: HubStreaming | None
    looked: bool = False

    def look_at_base(self) -> None:
        """Warn once of a base that does not look like the adapter's, as soon as its weights are local."""
        if self.plan.base.is_here and not self.looked:
            self.looked = True
            if doubt := doubt_base(self.plan):
                self.settings.warn(doubt)

    def write_tensors(self) -> tuple[Run, UnfinishedRun | None]:
        """Write every tensor, from the start or from an unfinished run; return the latter, too."""
        plan, output, hub = self.plan, self.output, self.hub
        maker = partial(MergeMaker, prove=plan.options.exact, observe=_observe(plan))
        key = run_key(plan, output, self.hashes, self.spec)
        unfinished = resume_plan(output, plan, key)
        if output.in_place and not unfinished:
            from ...engine.rehearsal import rehearse

            rehearse(plan, self.settings, self.spec, maker)
        if hub:
            hub.begin(output.partial)
        options = RunOptions(
            spec=self.spec,
            key=key,
            unfinished=unfinished,
            maker=maker,
            check=SelfCheck if self.settings.verify else None,
            hub=hub,
            hashed=_hashed(plan, output),
        )
        return run(plan, output, self.settings, options), unfinished

    def write_files(self, files: Sequence[SideFile], done: Run) -> None:
        """Write everything beside the weights: side files, the undo record, the receipt."""
        plan, output, results = self.plan, self.output, done.progress.done
        for file in files:
            output.put(file.name, file.source)
        if plan.options.undo != "none":
            with closing(Spool(output.state / SPOOL, done.progress.spooled)) as spool:
                parts = [*_kept(plan, results), *_originals(plan, files, spool)]
                spool.lay_out(parts, output.path(f"{RECORD}/{UNDO}"))
        proofs = {name: sha256(path) for name, path in base_files(plan.base).items()}
        computed = {
            "device": self.spec.device.type,
            "compute_dtype": self.spec.compute_name,
            "torch": torch.__version__,
        }
        receipt = new_receipt(plan, results, self.hashes, files, base_files=proofs, computed=computed)
        output.put(f"{RECORD}/{RECEIPT}", receipt.to_bytes())

    def publish(
        self,
        card: bytes,
        done: Run,
        unfinished: UnfinishedRun | None,
        verdict: Verdict | None,
        outputs: OutputsReport | None,
    ) -> MergeReport:
        """Commit to the Hub if asked, give the output its final name, and return the report."""
        hub, output = self.hub, self.output
        pushed = hub.finish(card, f"Merge with dora-convert {__version__}") if hub else None
        away = pushed.url if pushed and hub and not hub.local else None
        report = MergeReport.of(
            self.plan,
            self.settings,
            out=away or output.given,
            spec=self.spec,
            verdict=verdict,
            pushed=pushed,
            written=done.written,
            resumed=bool(unfinished and unfinished.lines),
            outputs=outputs.to_dict() if outputs else None,
        )
        if away:
            output.discard()
        else:
            stale = [] if self.plan.options.undo != "none" else [f"{RECORD}/{UNDO}"]
            output.publish(report.to_dict(), stale)
        return report


def _observe(plan: Plan) -> Observe | None:
    """Return the starter of undo keepers; None if an unmerge needs the output alone."""
    if not plan.undo_bytes:
        return None
    from ...undo.keep import keeper

    return partial(keeper, plan)


def _hashed(plan: Plan, output: Output) -> set[str]:
    """Return the copied tensors whose hashes an exact record holds; none in place."""
    wanted = plan.options.exact and not output.in_place
    return {item.name for item in plan.items if wanted and item.verbatim}


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
