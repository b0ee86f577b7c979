"""Compare a merged checkpoint, whoever made it, with what its base and adapters make: every element, in float64."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from ..engine.executor import Budget
from ..engine.precision import choose, exact_arithmetic
from ..engine.preflight import scan_adapter
from ..plan.item import Item
from ..plan.plan import Plan
from ..reports.verify import CheckedModule, Untouched, VerifyReport
from ..settings import Settings
from ..sources.prefetch import reading
from ..sources.session import Session
from ..storage.checkpoint import Checkpoint
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .causes import find_cause
from .headers import Pairing, config_problems, pair
from .tensor import Parity, compare_all


def verify_weights(
    plan: Plan, merged: Checkpoint, settings: Settings, session: Session, samples: int
) -> VerifyReport:
    """Compare every tensor, and the outputs of each merged module for some random inputs.

    Raises NumericalError where an adapter holds NaN or Inf.
    """
    for adapter in plan.adapters:
        scan_adapter(adapter)
    found = pair(plan, merged)
    needs = {item.name: (item.source.path, written.path) for item, written in found.pairs}
    with reading((plan.base, merged), needs, session) as reader:
        found.compare_twins(reader)
        compared, identical = _compare(found, settings, samples, reader)
        modules = [_module(parity, written, reader) for parity, written in compared if parity.item.changed]
    untouched = [(item, written) for item, written in found.pairs if not item.changed]
    differing = [item.name for item, _ in untouched if item.name not in identical]
    problems = [
        *found.problems,
        *_of_base(plan, len(untouched), differing, modules),
        *_of_modules(modules),
        *(f"{name} should be as in the base, and is not" for name in differing),
        *config_problems(plan, merged),
    ]
    return VerifyReport(
        base=plan.base.source.address,
        adapters=tuple(adapter.source.address for adapter in plan.adapters),
        merged=merged.source.address,
        verdict="differ" if problems else "agree",
        modules=tuple(modules),
        untouched=Untouched(tensors=len(untouched), identical=len(identical)),
        problems=tuple(problems),
        notes=tuple(found.notes),
        warnings=tuple(settings.warnings),
        ledger=tuple(entry.to_dict() for entry in plan.ledger),
        seconds=round(time.monotonic() - settings.started, 3),
    )


def _compare(
    found: Pairing, settings: Settings, samples: int, reader: Reader
) -> tuple[list[tuple[Parity, StoredTensor]], set[str]]:
    """Every tensor with an adapter's part in it compared, and the names of the others that are as they should be."""
    budget, done, total = Budget(settings.max_memory), [0], sum(w.nbytes for _, w in found.pairs)
    spec = choose(settings.device, "float64")
    settings.notify(f"device: {spec}")

    def one(item: Item, written: StoredTensor) -> Parity | bool:
        if item.verbatim and item.source.dtype == written.dtype:
            result: Parity | bool = reader.same_bytes(item.source, written)
        else:
            with budget.holding(min(settings.max_memory, item.cost(8))):
                parity = compare_all(item, written, reader, samples, spec.device)
            result = parity if item.changed else not parity.wrong
        reader.done(item.name)
        done[0] += written.nbytes
        if settings.on_progress:
            settings.on_progress(done[0], total)
        return result

    with exact_arithmetic(), ThreadPoolExecutor(settings.workers, initializer=_one_thread) as pool:
        try:
            results = list(pool.map(lambda both: one(*both), found.pairs))
        except BaseException:
            reader.stop()
            raise
    both = list(zip(found.pairs, results, strict=True))
    compared = [(parity, written) for (_, written), parity in both if isinstance(parity, Parity)]
    return compared, {item.name for (item, _), right in both if right is True}


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _module(parity: Parity, written: StoredTensor, reader: Reader) -> CheckedModule:
    """One module's part of the report; what went wrong is looked for where something did."""
    cause = find_cause(parity.item, written, parity.suspects, reader) if parity.wrong else None
    return CheckedModule(
        name=parity.item.name,
        elements=parity.elements,
        wrong_elements=parity.wrong,
        max_ulp=parity.max_ulp,
        output_error=parity.output_error,
        output_floor=parity.output_floor,
        cause=cause,
    )


def _of_modules(modules: Iterable[CheckedModule]) -> Iterator[str]:
    """Each module that is wrong, the worst first."""
    wrong = [module for module in modules if module.wrong_elements]
    for module in sorted(wrong, key=lambda module: -(module.output_error or 0)):
        why = f": {module.cause}" if module.cause else ""
        yield (
            f"{module.name}: {module.wrong_elements:,} of {module.elements:,} elements are wrong, "
            f"by up to {module.max_ulp} ulp{why}"
        )


def _of_base(plan: Plan, untouched: int, differing: list[str], modules: list[CheckedModule]) -> Iterator[str]:
    """Another base, where most of what no adapter touches is different; a mistake that all modules share."""
    unexplained = [module for module in modules if module.wrong_elements and not module.cause]
    if len(differing) * 2 > untouched and len(unexplained) * 2 > len(modules):
        yield f"another base: most tensors that no adapter touches are not those of {plan.base.source.name}"
    causes = Counter(module.cause for module in modules if module.cause)
    for cause, count in causes.most_common(1):
        if count > 1:
            yield f"{count} of {len(modules)} modules: {cause}"
