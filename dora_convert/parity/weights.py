"""Compare every tensor of a merged checkpoint, from any tool, with its base and adapters in float64."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial

from ..engine.precision import choose
from ..engine.preflight import check_magnitudes, scan_adapter
from ..engine.workers import WorkerPool
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


def verify_weights(plan: Plan, merged: Checkpoint, settings: Settings, session: Session, samples: int) -> VerifyReport:
    """Compare every tensor, and the outputs of each merged module for some random inputs.

    Raises NumericalError if an adapter holds NaN or Inf, UnsupportedError if its magnitudes are normalised.
    """
    for adapter in plan.adapters:
        scan_adapter(adapter)
    if plan.base.is_here:
        check_magnitudes(plan)
    pairing = pair(plan, merged)
    needs = {item.name: (item.source.path, written.path) for item, written in pairing.pairs}
    with reading((plan.base, merged), needs, session) as reader:
        pairing.compare_twins(reader)
        compared, identical = _compare(pairing, settings, samples, reader)
        modules = [_module(parity, written, reader) for parity, written in compared if parity.item.changed]
    untouched = [(item, written) for item, written in pairing.pairs if not item.changed]
    differing = [item.name for item, _ in untouched if item.name not in identical]
    problems = [
        *pairing.problems,
        *_of_base(plan, len(untouched), differing, modules),
        *_of_modules(modules),
        *(f"{name} differs from the base's" for name in differing),
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
        notes=tuple(pairing.notes),
        warnings=tuple(settings.warnings),
        ledger=tuple(entry.to_dict() for entry in plan.ledger),
        seconds=round(time.monotonic() - settings.started, 3),
    )


def _compare(
    pairing: Pairing, settings: Settings, samples: int, reader: Reader
) -> tuple[list[tuple[Parity, StoredTensor]], set[str]]:
    """Compare every tensor; return the results of changed ones, and the names of right unchanged ones."""
    done, total = [0], sum(written.nbytes for _, written in pairing.pairs)
    spec = choose(settings.device, "float64")
    settings.notify(f"device: {spec}")
    workers: WorkerPool[None] = WorkerPool(settings.max_memory, lambda: None, reader.stop)

    def compare(item: Item, written: StoredTensor, _: None) -> Parity | bool:
        workers.check()
        if item.verbatim and item.source.dtype == written.dtype:
            result: Parity | bool = reader.same_bytes(item.source, written)
        else:
            with workers.holding(item.cost(8)):
                parity = compare_all(item, written, reader, samples, spec.device)
            result = parity if item.changed else not parity.wrong
        reader.done(item.name)
        done[0] += written.nbytes
        if settings.on_progress:
            settings.on_progress(done[0], total)
        return result

    results = workers.run(settings.workers, [partial(compare, *pair) for pair in pairing.pairs])
    both = list(zip(pairing.pairs, results, strict=True))
    compared = [(parity, written) for (_, written), parity in both if isinstance(parity, Parity)]
    return compared, {item.name for (item, _), right in both if right is True}


def _module(parity: Parity, written: StoredTensor, reader: Reader) -> CheckedModule:
    """Return one module's part of the report, with the cause if elements are wrong."""
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
    """Yield a problem for each wrong module, the worst first."""
    wrong = [module for module in modules if module.wrong_elements]
    for module in sorted(wrong, key=lambda module: -(module.output_error or 0)):
        why = f": {module.cause}" if module.cause else ""
        yield (
            f"{module.name}: {module.wrong_elements:,} of {module.elements:,} elements are wrong, "
            f"by up to {module.max_ulp} ulp{why}"
        )


def _of_base(plan: Plan, untouched: int, differing: list[str], modules: list[CheckedModule]) -> Iterator[str]:
    """Yield a problem for another base, and one for a cause that several modules share."""
    unexplained = [module for module in modules if module.wrong_elements and not module.cause]
    if len(differing) * 2 > untouched and len(unexplained) * 2 > len(modules):
        yield f"another base: most tensors that no adapter touches are not those of {plan.base.source.name}"
    causes = Counter(module.cause for module in modules if module.cause)
    for cause, count in causes.most_common(1):
        if count > 1:
            yield f"{count} of {len(modules)} modules: {cause}"
