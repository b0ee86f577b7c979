"""extract: an adapter of a fine-tuned checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from ..adapters.adapter import Change
from ..adapters.new_adapter import NewAdapter
from ..adapters.updates import Decomposed, Full, LowRank
from ..errors import PlanError, UnsupportedError
from ..fitting.jobs import FittingPlan, Result, goal_of
from ..fitting.pairs import Pair, Sorted, Sorting, model_names, short_names
from ..fitting.report import share
from ..fitting.session import FittingSession
from ..hub.target import PushTarget
from ..lazy_torch import without_collections
from ..plan.planner import refuse_quantised
from ..reports.fitting import FittedModule, MadeDryRun, MadeReport
from ..settings import chosen
from ..sizes import format_size
from ..sources.inputs import open_base
from ..sources.prefetch import reading
from ..storage.checkpoint import Checkpoint
from ..storage.refs import PathLike

KINDS = {"dora": "dora", "lora": "lora"}
EMBEDDINGS = {"full": "full", "lora": "lora", "skip": "skip"}


def extract(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    *,
    kind: str = "dora",
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    embeddings: str = "full",
    exact_svd: bool = False,
    format: str = "peft",  # noqa: A002 - the option's name
    device: str = "auto",
    dtype: str = "auto",
    compute_dtype: str = "auto",
    max_memory: str | int = "auto",
    workers: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    base_model: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    cache: bool = True,
    token: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> MadeReport | MadeDryRun:
    """Make an adapter of what fine-tuning did: `kind` "dora" (m, B and A) or "lora" (the best factors of TUNED − BASE).

    Linear weights that differ get factors, by exactly one of `rank`, `energy` and `max_error`. Norms, biases and
    convolutions that differ are saved whole, and `embeddings` says what becomes of embeddings and heads: "full", "lora",
    or "skip", which leaves out all that has no factors.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    goal = goal_of(rank, energy, max_error)
    chosen(kind, KINDS, "--kind")
    chosen(embeddings, EMBEDDINGS, "--embeddings")
    single = compute_dtype != "float64"
    with FittingSession.begin(
        out, format=format, device=device, dtype=dtype, compute_dtype=compute_dtype, max_memory=max_memory, workers=workers,
        include=include, exclude=exclude, ignore_field=(), base_model=base_model, cache=cache, token=token, overwrite=overwrite,
        push=PushTarget.parse(push_to_hub=push_to_hub, private=private, create_pr=create_pr, commit_message=commit_message, token=token), on_progress=on_progress, on_notice=on_notice,
    ) as making:  # fmt: skip
        both = _open(making, base, tuned)
        return _run(making, both, goal, kind, embeddings, dry_run, exact=exact_svd, single=single)


def _run(
    making: FittingSession,
    both: tuple[Checkpoint, Checkpoint],
    goal: Mapping[str, Any],
    kind: str,
    embeddings: str,
    dry_run: bool,  # noqa: FBT001 - in the order of the options
    *,
    exact: bool,
    single: bool,
) -> MadeReport | MadeDryRun:
    """From open headers to the report."""
    differing = None if dry_run else _differing(*both, making)
    found = Sorting(*both, differing, making.options, embeddings=embeddings, kind=kind, single=single).run()
    _check(found, making, both[1], dry_run=dry_run)
    order = _order(both, making, found, goal, kind, embeddings, exact=exact, single=single)
    return making.finish(
        order,
        partial(_work, making, kind, goal, exact=exact, single=single),
        partial(_assemble, found, both, making.settings.base_model),
        _module,
        dry_run=dry_run,
        conclude=partial(_conclude, making),
        kind=kind,
        saved_whole=sorted(found.whole),
        skipped=found.skipped,
    )


def _open(making: FittingSession, base: PathLike, tuned: PathLike) -> tuple[Checkpoint, Checkpoint]:
    """The headers of both checkpoints."""
    refs = ((base, "BASE"), (tuned, "TUNED"))
    opened = [open_base(os.fspath(ref), what, making.session) for ref, what in refs]
    for checkpoint in opened:
        refuse_quantised(checkpoint)
    making.folder.refuse_inside([checkpoint.source.path for checkpoint in opened])
    return opened[0], opened[1]


def _differing(base: Checkpoint, tuned: Checkpoint, making: FittingSession) -> Collection[str]:
    """What fine-tuning changed: both are read for it."""
    with without_collections():
        from ..fitting.extract import differing
    before = model_names(base)
    both = {name: (before[name], tensor) for name, tensor in model_names(tuned).items() if name in before}
    needs = {name: (one.path, other.path) for name, (one, other) in both.items()}
    with reading((base, tuned), needs, making.session) as reader:
        return differing(both, reader)


def _check(found: Sorted, making: FittingSession, tuned: Checkpoint, *, dry_run: bool) -> None:
    """Raise all faults at once; say what is saved whole, what is left out, and how large that is."""
    if found.faults:
        raise PlanError(
            f"{len(found.faults)} tensors of {tuned.source.name} have no place in an adapter.",
            faults=found.faults,
            hint="is this a fine-tuned copy of BASE?",
        )
    if not found.pairs and not found.whole:
        raise UnsupportedError(f"Nothing to extract: {tuned.source.name} holds what BASE holds.")
    if not found.pairs:
        whole = ", ".join(sorted(found.whole)[:5])
        raise UnsupportedError(
            f"Only tensors that are saved whole differ ({whole} …): PEFT loads no adapter without factors."
        )
    for note in found.notes:
        making.settings.warn(note)
    if found.whole:
        size = format_size(sum(tensor.nbytes for tensor in found.whole.values()))
        making.settings.notify(
            f"{len(found.whole)} tensors {'may be' if dry_run else 'are'} saved whole, {size}"
        )
    if found.skipped and not dry_run:
        making.settings.warn(
            f"{len(found.skipped)} tensors that differ are left out: {', '.join(found.skipped[:5])} …"
        )


def _order(
    both: tuple[Checkpoint, Checkpoint],
    making: FittingSession,
    found: Sorted,
    goal: Mapping[str, Any],
    kind: str,
    embeddings: str,
    *,
    exact: bool,
    single: bool,
) -> FittingPlan:
    size = sum(tensor.nbytes for tensor in found.whole.values())
    for pair in found.pairs:
        rows, columns = pair.base.matrix
        size += 4 * min(goal.get("rank", rows), rows, columns) * (rows + columns) + 4 * max(rows, columns)
    words = [word for name, value in goal.items() for word in (f"--{name.replace('_', '-')}", f"{value:g}")]
    words += ["--kind", kind, *(["--embeddings", embeddings] if embeddings != "full" else [])]
    options = making.options
    names = [[pair.name for pair in found.pairs], sorted(found.whole)]
    return FittingPlan(
        command="extract",
        words=(*(checkpoint.source.title for checkpoint in both), "OUT", *words),
        bases=both,
        jobs=found.pairs,
        format=making.saves,
        bytes_out=size,
        terms={"goal": goal, "kind": kind, "names": names, "exact": exact, "single": single},
        makes_dora=kind == "dora",
        dtype=options.dtype,
        carried=tuple({tensor.path: None for tensor in found.whole.values()}),
    )


def _work(
    making: FittingSession, kind: str, goal: Mapping[str, Any], *, exact: bool, single: bool
) -> Callable[[Pair, Any], Any]:
    from ..fitting.extract import extract_module

    return partial(
        extract_module, kind=kind, goal=goal, exact=exact, single=single, dtype=making.options.dtype
    )


def _assemble(
    found: Sorted, both: tuple[Checkpoint, Checkpoint], base_model: str | None, results: Mapping[str, Result]
) -> dict[str, NewAdapter]:
    """The adapter: factors of what has some, everything else as TUNED has it."""
    base, tuned = both
    changes, targets, names = [], [], model_names(tuned)
    for pair in found.pairs:
        if not (tensors := results[pair.name].tensors):
            continue
        low = LowRank(tensors["A"], tensors["B"], 1.0, transposed=pair.embedding)
        changes.append(Change(pair.name, Decomposed(low, tensors["m"]) if "m" in tensors else low))
        targets.append(pair.name.rpartition(".")[0])
    changes += [Change(name, Full(value)) for name, value in found.whole.items()]
    architectures = (tuned.config or {}).get("architectures")
    made = NewAdapter(
        tuple(changes),
        base=base_model or base.source.repo,
        revision=None if base_model else base.source.commit,
        task=str(architectures[0]) if architectures else None,
        targets=tuple(sorted(set(short_names(targets, names)))),
        besides=frozenset(name.rpartition(".")[0] for name in names),
        keeps_ties=found.keeps_ties,
    )
    return {"": made}


def _module(name: str, result: Result) -> FittedModule:
    facts = result.facts
    names = {
        "one_percent": "rank_for_1_percent",
        "one_permille": "rank_for_0.1_percent",
        "known": "ranks_computed",
    }
    details = {
        names.get(key, key): value
        for key, value in facts.items()
        if key in (*names, "lora_error", "converged", "steps")
    }
    error = share(facts["lost"], facts["change"])
    return FittedModule(name=name, rank=facts["rank"], relative_error=error, details=details)


def _conclude(making: FittingSession, results: Mapping[str, Result]) -> dict[str, Any]:
    """The error that a LoRA would have, and which searches did not end by themselves."""
    found = [result.facts for result in results.values() if "lora_error" in result.facts]
    if not found:
        return {}
    change = sum(facts["change"] for facts in found)
    lost = sum(facts["lora_error"] ** 2 * facts["change"] for facts in found)
    if unsure := [name for name, result in results.items() if not result.facts.get("converged", True)]:
        making.settings.warn(f"{len(unsure)} modules may have a better DoRA, such as {unsure[0]}")
    return {"lora_error": share(lost, change), "converged": not unsure}
