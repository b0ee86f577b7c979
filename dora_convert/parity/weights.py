"""Compare every tensor of a merged checkpoint, from any tool, with its base and adapters in float64."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ..codecs.coded import CodedTensor
from ..engine.doubts import check_magnitudes
from ..engine.precision import ComputeSpec, choose, scan_adapter
from ..engine.workers import WorkerPool
from ..plan.item import Item
from ..plan.plan import Plan
from ..reports.verify import CheckedModule, Untouched, VerifyReport
from ..settings import Settings
from ..sources import Session
from ..sources.prefetch import reading
from ..storage.checkpoint import Checkpoint
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .combined import expected_of
from .headers import Pairing, config_problems, pair
from .recoded import compare_coded
from .tensor import Outputs, compare_all


def verify_weights(plan: Plan, merged: Checkpoint, settings: Settings, session: Session, samples: int) -> VerifyReport:
    """Compare every tensor, and the outputs of each merged module for some random inputs.

    Raises NumericalError if an adapter holds NaN or Inf, UnsupportedError if its magnitudes are normalised.
    """
    for adapter in plan.adapters:
        scan_adapter(adapter)
    if plan.base.is_here:
        check_magnitudes(plan)
    pairing = pair(plan, merged)
    needs = {item.name: (*item.source.paths, *written.paths) for item, written in pairing.pairs}
    with reading((plan.base, merged), needs, session) as reader:
        pairing.compare_twins(reader)
        results = _compare(pairing, settings, samples, reader)
    modules = [result for result in results if isinstance(result, CheckedModule)]
    untouched = [item.name for item, _ in pairing.pairs if not item.changed]
    differing = [item.name for (item, _), result in zip(pairing.pairs, results, strict=True) if result is False]
    problems = [
        *pairing.problems,
        *_of_base(plan, len(untouched), len(differing), modules),
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
        untouched=Untouched(tensors=len(untouched), identical=len(untouched) - len(differing)),
        problems=tuple(problems),
        notes=tuple(pairing.notes),
        warnings=tuple(settings.warnings),
        ledger=tuple(entry.to_dict() for entry in plan.ledger),
        seconds=round(time.monotonic() - settings.started, 3),
    )


def _compare(pairing: Pairing, settings: Settings, samples: int, reader: Reader) -> list[CheckedModule | bool]:
    """Compare every tensor; return the report of each changed one, and of others True if they are the base's."""
    done, total = 0, sum(written.nbytes for _, written in pairing.pairs)
    spec = choose(settings.device, "float64")
    settings.notify(f"device: {spec}")
    workers: WorkerPool[ComputeSpec] = WorkerPool(settings.max_memory, spec.dealt(), reader.stop)

    def compare(item: Item, written: StoredTensor, lane: ComputeSpec) -> CheckedModule | bool:
        nonlocal done
        workers.check()
        if written.coded and (item.source.coded or item.changed):
            with workers.holding(item.cost(8)):
                result: CheckedModule | bool = _compare_coded(item, written, reader, samples, lane.device)
        elif item.verbatim and item.source.dtype == written.dtype:
            result = reader.same_bytes(item.source, written)
        else:
            with workers.holding(item.cost(8)):
                module = compare_all(item, written, reader, samples, lane.device)
            result = module if item.changed else not module.wrong_elements
        reader.done(item.name)
        done += written.nbytes
        if settings.on_progress:
            settings.on_progress(done, total)
        return result

    return workers.run(settings.workers, [partial(compare, *pair) for pair in pairing.pairs])


def _compare_coded(
    item: Item, written: StoredTensor, reader: Reader, samples: int, device: torch.device
) -> CheckedModule | bool:
    """Compare every element of a coded weight; of one that no adapter touched return True if its parts are the base's.

    An adapter's weight may lie anywhere within half a step of its codes, and its parts as well.
    """
    source = item.source
    if not item.changed and isinstance(source, CodedTensor) and isinstance(written, CodedTensor):
        pairs = [(part, written.parts.get(role)) for role, part in source.parts.items()]
        return all(other is not None and reader.same_bytes(part, other) for part, other in pairs)
    expected = expected_of(item, reader, device)
    outputs = Outputs(expected, samples if len(item.shape) > 1 else 0, device)
    verdict = compare_coded(written, expected, range(item.matrix[0]), reader, outputs)
    error, floor = outputs.relative()
    return CheckedModule(
        name=item.name,
        elements=written.numel,
        wrong_elements=verdict.wrong,
        max_ulp=verdict.max_ulp,
        output_error=error,
        output_floor=floor,
        cause=None,
    )


def _of_modules(modules: Sequence[CheckedModule]) -> Iterator[str]:
    """Yield a problem for each wrong module, the worst first."""
    wrong = [module for module in modules if module.wrong_elements]
    for module in sorted(wrong, key=lambda module: -(module.output_error or 0)):
        why = f": {module.cause}" if module.cause else ""
        yield (
            f"{module.name}: {module.wrong_elements:,} of {module.elements:,} elements are wrong, "
            f"by up to {module.max_ulp} ulp{why}"
        )


def _of_base(plan: Plan, untouched: int, differing: int, modules: Sequence[CheckedModule]) -> Iterator[str]:
    """Yield a problem for another base, and one for a cause that several modules share."""
    unexplained = [module for module in modules if module.wrong_elements and not module.cause]
    if differing * 2 > untouched and len(unexplained) * 2 > len(modules):
        yield f"another base: most tensors that no adapter touches are not those of {plan.base.source.name}"
    causes = Counter(module.cause for module in modules if module.cause)
    for cause, count in causes.most_common(1):
        if count > 1:
            yield f"{count} of {len(modules)} modules: {cause}"
