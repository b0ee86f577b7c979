"""extract: make an adapter of a fine-tuned checkpoint."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from ..adapters import Change, Decomposed, Full, LowRank
from ..adapters.new_adapter import NewAdapter
from ..errors import PlanError, UnsupportedError
from ..fitting.jobs import FittingPlan, Result, doubt_ranks, goal_words, header, parse_goal
from ..fitting.model_weights import model_weights
from ..fitting.pairs import Differences, both_of, short_names
from ..fitting.session import Fitter, FittingSession
from ..options import ExtractOptions
from ..plan.quantised import as_dense
from ..reports.fitting import MadeDryRun, MadeReport
from ..settings import format_size
from ..sources.inputs import open_base
from ..sources.prefetch import reading
from ..storage.checkpoint import Checkpoint
from ..storage.refs import PathLike, refuse_missing
from ..torch_import import without_collections
from . import takes

if TYPE_CHECKING:
    from ..fitting.run import FitJob

DETAILS = {
    "one_percent": "rank_for_1_percent",
    "one_permille": "rank_for_0.1_percent",
    "known": "ranks_computed",
    "lora_error": "lora_error",
    "converged": "converged",
    "steps": "steps",
}
"""The report's names of a module's facts."""


@takes(ExtractOptions)
def extract(
    base: PathLike, tuned: PathLike, out: PathLike, **options: Unpack[ExtractOptions]
) -> MadeReport | MadeDryRun:
    """Make an adapter of a fine-tuned checkpoint: `kind` "dora" (m, B, A) or "lora" (B, A).

    Linear weights that differ get factors, by exactly one of `rank`, `energy` and `max_error`; `ranks` "one"
    gives all of them the largest rank that any needs, "per-module" each its own. Norms, biases
    and convolutions that differ are saved whole. `embeddings` decides about embeddings and heads: "full",
    "lora", or "skip", which leaves out all that has no factors.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    goal = parse_goal(options)
    with FittingSession.begin(out, options) as session:
        before, after = _open(session, base, tuned)
        modules = {name.rpartition(".")[0] for name in model_weights(after).names}
        for doubt in session.selection.check_globs(modules):
            session.settings.warn(doubt)
        names = None if options["dry_run"] else _differing(before, after, session)
        differences = Differences(
            before,
            after,
            names,
            session.selection,
            embeddings=options["embeddings"],
            kind=options["kind"],
            single=session.single,
            rank=goal.get("rank"),
        )
        _check(differences, session, after)
        fitter = _Extraction(
            session=session, base=before, tuned=after, differences=differences, options=options, goal=goal
        )
        return session.finish(
            fitter, kind=options["kind"], saved_whole=sorted(differences.whole), skipped=differences.skipped
        )


def _open(session: FittingSession, base: PathLike, tuned: PathLike) -> tuple[Checkpoint, Checkpoint]:
    refuse_missing(("BASE", base), ("TUNED", tuned))
    before = open_base(os.fspath(base), "BASE", session.session)
    after = open_base(os.fspath(tuned), "TUNED", session.session)
    before, after = as_dense(before), as_dense(after)
    session.folder.refuse_inside([before.source.path, after.source.path])
    return before, after


def _differing(base: Checkpoint, tuned: Checkpoint, session: FittingSession) -> Collection[str]:
    """Return the names of the tensors that fine-tuning changed; both checkpoints are read."""
    with without_collections(numpy=False):
        from ..fitting.extract import differing
    both = both_of(model_weights(base), model_weights(tuned))
    needs = {name: (*one.paths, *other.paths) for name, (one, other) in both.items()}
    with reading((base, tuned), needs, session.session) as reader:
        return differing(both, reader)


def _check(differences: Differences, session: FittingSession, tuned: Checkpoint) -> None:
    """Raise all faults at once; report the tensors saved whole and those left out."""
    settings, dry_run, whole = session.settings, session.options["dry_run"], differences.whole
    if differences.faults:
        raise PlanError(
            f"{len(differences.faults)} tensors of {tuned.source.name} have no place in an adapter.",
            faults=differences.faults,
            hint="is this a fine-tuned copy of BASE?",
        )
    if not differences.pairs and not whole:
        raise UnsupportedError(f"Nothing to extract: {tuned.source.name} holds what BASE holds.")
    if not differences.pairs:
        raise UnsupportedError(
            f"Only tensors that are saved whole differ ({', '.join(sorted(whole)[:5])} …): "
            "PEFT loads no adapter without factors."
        )
    for note in differences.notes:
        settings.warn(note)
    if whole:
        size = format_size(sum(tensor.nbytes for tensor in whole.values()))
        settings.notify(f"{len(whole)} tensors {'may be' if dry_run else 'are'} saved whole, {size}")
    if differences.skipped and not dry_run:
        shown = ", ".join(differences.skipped[:5])
        settings.warn(f"{len(differences.skipped)} tensors that differ are left out: {shown} …")


@dataclass(frozen=True, kw_only=True)
class _Extraction(Fitter):
    """Fits factors, and magnitudes for a DoRA, to the change by fine-tuning."""

    session: FittingSession
    base: Checkpoint
    tuned: Checkpoint
    differences: Differences
    options: ExtractOptions
    goal: Mapping[str, Any]

    def plan(self) -> FittingPlan:
        """Return the weights that get factors."""
        kind, embeddings = self.options["kind"], self.options["embeddings"]
        pairs, whole, session = self.differences.pairs, self.differences.whole, self.session
        size = sum(tensor.nbytes for tensor in whole.values())
        ranks = [min(self.goal.get("rank", pair.inputs[0].numel), *pair.matrix) for pair in pairs]
        one_rank = self.options["ranks"] == "one"
        for rank, pair in zip(ranks, pairs, strict=True):
            rows, columns = pair.matrix
            factors = 4 * (max(ranks) if one_rank else rank) * (rows + columns)
            size += (pair.experts or 1) * factors + 4 * max(rows, columns)
        words = [*goal_words(self.goal, self.options["ranks"]), "--kind", kind]
        words += ["--embeddings", embeddings] if embeddings != "full" else []
        names = [[pair.name for pair in pairs], sorted(whole)]
        terms = {"goal": self.goal, "kind": kind, "names": names}
        return FittingPlan(
            command="extract",
            words=(self.base.source.title, self.tuned.source.title, "OUT", *words),
            bases=(self.base, self.tuned),
            jobs=pairs,
            format=session.format,
            bytes_out=size,
            terms={**terms, "exact": self.options["exact_svd"], "single": session.single},
            goal=self.goal,
            one_rank=one_rank,
            is_dora=kind == "dora",
            dtype=session.selection.dtype,
            carried=tuple({tensor.path: None for tensor in whole.values()}),
        )

    def load(self) -> FitJob:
        """Return the decomposition of one weight's change."""
        from ..fitting.extract import extract_module

        return partial(
            extract_module,
            kind=self.options["kind"],
            goal=self.goal,
            exact=self.options["exact_svd"],
            single=self.session.single,
            dtype=self.session.selection.dtype,
        )

    def expected(self) -> dict[str, Result]:
        """Return the headers of the factors and magnitudes, of the largest ranks."""
        found: dict[str, Result] = {}
        for pair in self.differences.pairs:
            rank = min(self.goal.get("rank", pair.inputs[0].numel), *pair.matrix)
            r, shape = rank * (pair.experts or 1), tuple(pair.matrix[::-1] if pair.embedding else pair.matrix)
            if not pair.experts and len(pair.inputs[0].shape) > 2:  # a convolution
                shape = pair.inputs[0].shape
            tensors = {"A": header("A", r, *shape[1:]), "B": header("B", shape[0], r, *[1] * (len(shape) - 2))}
            tensors |= {"m": header("m", shape[0])} if self.options["kind"] == "dora" else {}
            found[pair.name] = Result(tensors, {"rank": rank})
        return found

    def assemble(self, results: Mapping[str, Result]) -> dict[str, NewAdapter]:
        """Return the adapter: factors where there are some, everything else as TUNED has it."""
        changes, targets, weights = [], [], self.differences.after
        parameters = self.differences.parameters()
        for pair in self.differences.pairs:
            if not (tensors := results[pair.name].tensors):
                continue
            low = LowRank(tensors["A"], tensors["B"], 1.0, transposed=pair.embedding, experts=pair.experts)
            changes.append(Change(pair.name, Decomposed(low, tensors["m"]) if "m" in tensors else low))
            targets += [pair.name.rpartition(".")[0]] if pair.name not in parameters else []
        changes += [Change(name, Full(value)) for name, value in self.differences.whole.items()]
        architectures = (self.tuned.config or {}).get("architectures")
        source, base_model = self.base.source, self.session.settings.base_model
        adapter = NewAdapter(
            tuple(changes),
            base=base_model or source.repo,
            revision=None if base_model else source.commit,
            task=str(architectures[0]) if architectures else None,
            targets=tuple(sorted(set(short_names(targets, weights.names)))),
            parameters=frozenset(change.target for change in changes) & parameters,
            besides=frozenset(name.rpartition(".")[0] for name in weights.names),
            weights=frozenset(weights.names) if parameters else frozenset(),
            keeps_ties=self.differences.keeps_ties,
            model=self.base,
        )
        return {"": adapter}

    def describe(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the facts of a module that the report shows."""
        return {name: facts[fact] for fact, name in DETAILS.items() if fact in facts}

    def conclude(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Return the error that a LoRA would have, and True if all searches converged."""
        if doubt := doubt_ranks([result.facts for result in results.values() if result.tensors]):
            self.session.settings.warn(doubt)
        facts = [result.facts for result in results.values() if "lora_error" in result.facts]
        if not facts:
            return {}
        change = sum(fact["change"] for fact in facts)
        lost = sum(fact["lora_error"] ** 2 * fact["change"] for fact in facts)
        if unsure := [name for name, result in results.items() if not result.facts.get("converged", True)]:
            self.session.settings.warn(f"{len(unsure)} modules may have a better DoRA, such as {unsure[0]}")
        return {"lora_error": (lost / change) ** 0.5 if change else 0.0, "converged": not unsure}
