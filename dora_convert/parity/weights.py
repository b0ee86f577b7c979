"""Compare every tensor of a merged checkpoint, from any tool, with its base and adapters in float64."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.doubts import check_magnitudes
from ..engine.precision import choose, scan_adapter
from ..engine.streams import DeviceStream
from ..engine.workers import WorkerPool
from ..plan.item import Item
from ..plan.plan import Plan
from ..reports.verify import CheckedModule, Untouched, VerifyReport
from ..settings import Settings
from ..sources import Session
from ..sources.prefetch import reading
from ..storage.checkpoint import Checkpoint
from ..storage.reader import Reader
from .comparing import Comparing
from .headers import Pairing, config_problems, pair

if TYPE_CHECKING:
    from ..cluster.jobs import Cluster


def verify_weights(
    plan: Plan,
    merged: Checkpoint,
    settings: Settings,
    session: Session,
    samples: int,
    *,
    cluster: Cluster | None = None,
) -> VerifyReport:
    """Compare every tensor, and the outputs of each merged module for some random inputs.

    The nodes of `cluster` compare; None for threads of this process.

    Raises NumericalError if an adapter holds NaN or Inf, UnsupportedError if its magnitudes are normalised.
    """
    for adapter in plan.adapters:
        scan_adapter(adapter)
    if plan.base.is_here:
        check_magnitudes(plan)
    pairing = pair(plan, merged)
    needs = {item.name: (*_read_by(item), *written.paths) for item, written in pairing.pairs}
    with reading((plan.base, merged), needs, session) as reader:
        pairing.compare_twins(reader)
        results = _compare(pairing, settings, samples, reader, cluster)
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


def _compare(
    pairing: Pairing, settings: Settings, samples: int, reader: Reader, cluster: Cluster | None
) -> list[CheckedModule | bool]:
    """Compare every tensor; return the report of each changed one, and of others True if they are the base's."""
    done, sizes = 0, [written.nbytes for _, written in pairing.pairs]

    def advance(numbers: Iterable[int]) -> None:
        nonlocal done
        done += sum(sizes[number] for number in numbers)
        if settings.on_progress:
            settings.on_progress(done, sum(sizes))

    if cluster:
        return _compare_on(cluster, pairing, settings, samples, advance)
    spec = choose(settings.device, "float64")
    if spec.staged:
        from ..engine.device_plan import fit_settings, load_solvers

        fit_settings(spec, settings)
        load_solvers(spec, (edit for item, _ in pairing.pairs for edit in item.edits))
    settings.notify(f"device: {spec}")
    workers = WorkerPool(settings.max_memory, DeviceStream.dealt(spec), reader.stop)
    comparing = Comparing(pairing.pairs, samples, spec, settings.memory_each)

    def compare(number: int, mine: DeviceStream) -> CheckedModule | bool:
        workers.check()
        if (later := number + settings.workers) < len(sizes):
            comparing.read_ahead(later, reader)
        with mine.working():
            result = comparing.one(number, reader, mine.device, workers.holding)
        reader.done(pairing.pairs[number][0].name)
        advance([number])
        return result

    return workers.run(settings.workers, [partial(compare, number) for number in range(len(sizes))])


def _compare_on(
    cluster: Cluster, pairing: Pairing, settings: Settings, samples: int, advance: Callable[[Iterable[int]], None]
) -> list[CheckedModule | bool]:
    """Compare every tensor on the nodes of a cluster; each task is a range of pairs."""
    from ..cluster.jobs import choose_for, ranges

    spec = choose_for(cluster, replace(settings, compute_dtype="float64"))
    settings.notify(f"device: {spec}")
    results: dict[int, CheckedModule | bool] = {}
    tasks = ranges([written.nbytes for _, written in pairing.pairs], cluster.slots)
    job = Comparing(pairing.pairs, samples, spec)
    for numbers, found in cluster.map(job, tasks):
        results |= zip(numbers, found, strict=True)
        advance(numbers)
    return [results[number] for number in range(len(pairing.pairs))]


def _of_modules(modules: Sequence[CheckedModule]) -> Iterator[str]:
    """Yield a problem for each wrong module, the worst first."""
    wrong = [module for module in modules if module.wrong_elements]
    for module in sorted(wrong, key=lambda module: -(module.output_error or 0)):
        why = f": {module.cause}" if module.cause else ""
        yield (
            f"{module.name}: {module.wrong_elements:,} of {module.elements:,} elements are wrong, "
            f"by up to {module.max_ulp} ulp{why}"
        )


def _read_by(item: Item) -> Iterator[Path]:
    """Yield the base's files that the definition of a tensor reads."""
    yield from item.source.paths
    for edit in item.edits:
        if edit.follows:
            yield from edit.follows.source.paths


def _of_base(plan: Plan, untouched: int, differing: int, modules: Sequence[CheckedModule]) -> Iterator[str]:
    """Yield a problem for another base, and one for a cause that several modules share."""
    unexplained = [module for module in modules if module.wrong_elements and not module.cause]
    if differing * 2 > untouched and len(unexplained) * 2 > len(modules):
        yield f"another base: most tensors that no adapter touches are not those of {plan.base.source.name}"
    causes = Counter(module.cause for module in modules if module.cause)
    for cause, count in causes.most_common(1):
        if count > 1:
            yield f"{count} of {len(modules)} modules: {cause}"
