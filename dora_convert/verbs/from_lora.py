"""from-lora: make a DoRA of a LoRA, with the same outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from ..adapters import Change, Decomposed, LowRank, low_rank, tensors_of
from ..adapters.new_adapter import NewAdapter
from ..errors import Fault, UnsupportedError, UsageError
from ..fitting.jobs import FittingPlan, MatchedChange, Result, header, match_changes, modules_besides
from ..fitting.session import Fitter, FittingSession
from ..naming.resolve import is_embedding, is_head
from ..options import FromLoraOptions
from ..plan.plan import Plan
from ..reports.fitting import MadeDryRun, MadeReport
from ..storage.refs import PathLike
from . import takes

if TYPE_CHECKING:
    from ..fitting.run import FitJob

TIED = "serves as embedding and as head, whose norms run along different axes"
REST = "lora"
"""The sub-folder of OUT for modules that stay a LoRA."""


@takes(FromLoraOptions)
def from_lora(
    base: PathLike | None, lora: PathLike, out: PathLike, **options: Unpack[FromLoraOptions]
) -> MadeReport | MadeDryRun:
    """Make a DoRA of a LoRA: the same factors, and m = ‖W + sBA‖, so that outputs stay as they are.

    `base` and `lora` are folders or Hub repos; a base of None is the one that the adapter names. With `init`
    "pretrained", m = ‖W‖, the start of DoRA's paper. With `split`, modules that cannot be DoRA stay LoRA, in
    an adapter of their own in `out`/lora; otherwise they are an error that names them all.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    with FittingSession.begin(out, options) as session:
        matched = session.match(base, lora, "from-lora")
        if any(isinstance(change.update, Decomposed) for change in matched.adapters[0].changes):
            name = matched.adapters[0].source.name
            raise UsageError(f"The adapter {name} is a DoRA already.", hint="to-lora goes the other way")
        changes = _divide(matched, session, split=options["split"])
        left = [change.target for change in changes.rest]
        fitter = _FromLora(session, matched, changes, options)
        return session.finish(fitter, init=options["init"], left_as_lora=left)


@dataclass(frozen=True)
class _LoraChanges:
    """The changes of a LoRA: those that become DoRA, those that cannot, and those without factors."""

    jobs: list[MatchedChange]
    refused: list[MatchedChange]
    unmatched: list[Change]
    others: list[Change]

    @property
    def rest(self) -> list[Change]:
        """The changes that stay a LoRA."""
        return [job.change for job in self.refused] + self.unmatched


def _divide(matched: Plan, session: FittingSession, *, split: bool) -> _LoraChanges:
    """Return the changes by their fate; without `split`, UnsupportedError lists those that cannot be DoRA."""
    adapter, width = matched.adapters[0], matched.options.width
    jobs, unmatched, others = match_changes(matched, lambda item, _: item.cost(width))
    faults = {change.target: TIED for change in unmatched}
    for job in jobs:
        tied = unmatched and (is_embedding(job.name) or is_head(job.name))
        why = TIED if tied else session.format.writer().objection(job.change, job.item.name, adapter)
        if why or not isinstance(job.change.update, LowRank):
            faults[job.name] = why or f"is {job.change.update.title}, not a LoRA; to-lora makes one of it"
    accepted = [job for job in jobs if job.name not in faults]
    if not accepted or (faults and not split):
        raise UnsupportedError(
            f"{len(faults)} modules of {adapter.source.name} cannot be DoRA.",
            faults=[Fault(name, why) for name, why in faults.items()],
            hint=f"--split leaves them LoRA, in an adapter of their own in OUT/{REST}" if accepted else None,
        )
    return _LoraChanges(accepted, [job for job in jobs if job.name in faults], unmatched, others)


@dataclass(frozen=True)
class _FromLora(Fitter):
    """Fits the magnitudes of a LoRA's modules."""

    session: FittingSession
    matched: Plan
    changes: _LoraChanges
    options: FromLoraOptions

    def plan(self) -> FittingPlan:
        """Return the modules whose magnitudes are computed."""
        changes, adapter, base = self.changes, self.matched.adapters[0], self.matched.base
        init, split = self.options["init"], self.options["split"]
        copied = [*(job.change for job in changes.jobs), *changes.rest, *changes.others]
        size = sum(tensor.nbytes for change in copied for tensor in tensors_of(change.update))
        words = (["--init", init] if init != "preserve" else []) + (["--split"] if split else [])
        return FittingPlan(
            command="from-lora",
            words=(base.source.title, adapter.source.title, "OUT", *words),
            bases=(base,),
            jobs=changes.jobs,
            format=self.session.format,
            bytes_out=size + sum(4 * low.outputs for job in changes.jobs if (low := low_rank(job.change.update))),
            terms={"plan": self.matched.fingerprint, "init": init, "split": split},
            is_dora=True,
            like=adapter,
            dtype=self.session.selection.dtype,
        )

    def load(self) -> FitJob:
        """Return the computation of one module's m."""
        from ..fitting.magnitudes import magnitudes

        return partial(magnitudes, preserve=self.options["init"] == "preserve")

    def expected(self) -> dict[str, Result]:
        """Return the headers of the magnitudes."""
        lows = ((job.name, low_rank(job.change.update)) for job in self.changes.jobs)
        return {name: Result({"m": header("m", low.outputs)}, {}) for name, low in lows if low}

    def assemble(self, results: Mapping[str, Result]) -> dict[str, NewAdapter]:
        """Return the DoRA, and in a sub-folder the LoRA of modules that cannot be DoRA."""
        changes, adapter = self.changes, self.matched.adapters[0]
        decomposed = [
            replace(job.change, update=Decomposed(low, results[job.name].tensors["m"]))
            for job in changes.jobs
            if isinstance(low := job.change.update, LowRank)
        ]
        before = sum(isinstance(change.update, LowRank) for change in adapter.changes)
        dora = NewAdapter(
            (*decomposed, *changes.others),
            adapter,
            self.session.settings.base_model,
            targets=None if len(decomposed) == before else (),
            besides=modules_besides(self.matched, changes.jobs),
            model=self.matched.base,
        )
        if not changes.rest:
            return {"": dora}
        besides = modules_besides(self.matched, changes.refused)
        return {"": dora, f"{REST}/": replace(dora, changes=tuple(changes.rest), besides=besides)}
