"""Make one LoRA of several adapters: the best factors of what they do together to each weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import Change, LowRank, Update, transform_of
from ..adapters.new_adapter import NewAdapter
from ..errors import Fault, UnsupportedError
from ..options import ToLoraOptions
from ..plan.item import Item
from ..plan.plan import Plan
from .combined_change import CombinedChange
from .jobs import HELD, FittingPlan, Result, compression_of, error_of, expected_factors, goal_words
from .session import Fitter, FittingSession

if TYPE_CHECKING:
    from .run import FitJob

_Key = tuple[tuple[Path, str], ...]

COMPARED = 1 << 21
"""Elements of ΔW that are compared with the product of the factors at once, in float64."""


@dataclass(frozen=True)
class SeveralToLora(Fitter):
    """Fits factors to the combined changes of several adapters."""

    session: FittingSession
    matched: Plan
    options: ToLoraOptions
    goal: Mapping[str, Any]

    def plan(self) -> FittingPlan:
        """Return the modules that get factors; UnsupportedError names every change that no LoRA holds."""
        adapters, base = self.matched.adapters, self.matched.base
        changed = (item for item in self.matched.items if item.changed)
        if faults := [Fault(item.name, why) for item in changed if (why := _refusal(item))]:
            raise UnsupportedError(
                "One LoRA of several adapters holds factors alone.",
                faults=faults,
                hint="--exclude leaves these modules out; merge keeps all of them",
            )
        jobs = self._jobs
        rank = max((self._rank(job) for job in jobs), default=0)
        chosen = self.matched.options.combination
        words = (*(source.title for source in (base.source, *(each.source for each in adapters))), "OUT")
        return FittingPlan(
            command="to-lora",
            words=(*words, *" ".join(chosen.words).split(), *goal_words(self.goal, self.options["ranks"])),
            bases=(base,),
            jobs=jobs,
            format=self.session.format,
            bytes_out=sum(4 * rank * sum(job.item.source.matrix) for job in jobs),
            terms={
                "plan": self.matched.fingerprint,
                "exact": self.options["exact_svd"],
                "single": self.session.single,
                "weights": self.matched.weights,
            },
            goal=self.goal,
            one_rank=self.options["ranks"] == "one",
            like=adapters[0],
            others=adapters[1:],
            dtype=self.session.selection.dtype,
        )

    @property
    def _jobs(self) -> list[CombinedChange]:
        changed = (item for item in self.matched.items if item.changed)
        return [CombinedChange(item.name, (item.source,), self._cost(item), item) for item in changed]

    def _cost(self, item: Item) -> int:
        """Return the bytes that a job holds: blocks, edits, and matrices."""
        matrix = HELD["lora"] * (4 if self.session.single else 8) * item.source.numel
        return item.cost(self.matched.options.width) + max(matrix, 24 * min(item.source.numel, COMPARED))

    def _rank(self, job: CombinedChange) -> int:
        """Return the largest rank that a module's new factors can have."""
        exact = min(job.item.source.matrix)
        if lows := job.lows:
            exact = min(exact, sum(low.rank for low in lows))
        return min(exact, self.goal.get("rank") or exact)

    def load(self) -> FitJob:
        """Return the factors of one module's combined change."""
        from .compress_several import compress_several

        return partial(
            compress_several,
            goal=self.goal,
            exact=self.options["exact_svd"],
            single=self.session.single,
            dtype=self.session.selection.dtype,
        )

    def expected(self) -> dict[str, Result]:
        """Return the headers of the new factors, of the largest ranks."""
        found: dict[str, Result] = {}
        for job in self._jobs:
            found |= expected_factors(job, job.item.source.matrix, job.item.edits[0].low, self._rank(job))
        return found

    def assemble(self, results: Mapping[str, Result]) -> dict[str, NewAdapter]:
        """Return the LoRA, whose scaling is 1."""
        first = self.matched.adapters[0]
        changes, names = [], self._targets()
        for item in (item for item in self.matched.items if item.changed):
            tensors, own = results[item.name].tensors, item.edits[0].update
            kind = transform_of(own)
            low = LowRank(tensors["A"], tensors["B"], 1.0, transposed=kind.transposed if kind else None)
            changes.append(Change(names.get(_key(own), item.name), low))
        adapted = {item.name for item in self.matched.items if item.changed}
        besides = frozenset(name.rpartition(".")[0] for name in self.matched.base.tensors if name not in adapted)
        lora = NewAdapter(
            tuple(changes),
            replace(first, ignored={}),
            self.session.settings.base_model,
            targets=(),
            besides=besides,
            model=self.matched.base,
        )
        return {"": lora}

    def _targets(self) -> dict[_Key, str]:
        """Return the adapters' names of weights, by the tensors of their changes."""
        changes = [change for adapter in self.matched.adapters for change in adapter.changes]
        return {_key(change.update): change.target for change in changes}

    def describe(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the error of a module's outputs, and the ranks that smaller errors would need."""
        return compression_of(facts)

    def conclude(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Return the error of all outputs together."""
        facts = [result.facts for result in results.values()]
        return {"output_error": error_of(facts, "output_lost", "output")}


def _key(update: Update) -> _Key:
    """Return the files and names of all tensors: modules may share some of them, as VeRA's factors."""
    return tuple((tensor.path, tensor.name) for tensor in update.tensors)


def _refusal(item: Item) -> str | None:
    """Return why no factors hold an item's change; None if they do."""
    if item.replaced or item.added:
        return "is replaced, or has new rows"
    for edit in item.edits:
        if edit.follows or len(item.shape) < 2:
            return "is a bias"
        if edit.outputs or (edit.low and (edit.low.experts or edit.low.start)):
            return "is a stack of experts, a part of a fused weight, or a kind that takes a part of it away"
    return None if math.prod(item.shape) else "is empty"
