"""Measure the modules of one checkpoint or adapter in worker threads, within the memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..engine.device_buffers import DeviceBuffers
from ..engine.precision import ComputeSpec
from ..engine.workers import WorkerPool
from ..plan.item import Item
from ..reports.analyze import Collision, MovedVector
from ..settings import Settings
from ..sources import Session
from ..sources.prefetch import reading
from ..storage.checkpoint import Checkpoint
from .collision import collide
from .modules import AnalysedModule, PairedTensors, needs_of
from .movement import ModuleBlocks, measure_module

Task = Callable[[DeviceBuffers], Any]


@dataclass
class Measuring:
    """Runs tasks of several steps, and counts the bytes that they read."""

    settings: Settings
    session: Session
    spec: ComputeSpec
    total: int
    done: int = 0

    def run(self, modules: Mapping[str, AnalysedModule], checkpoints: Iterable[Checkpoint], task: Any) -> list[Any]:
        """Return the results of a task for each module; `task` takes the module's name and a worker's buffers."""
        width = self.spec.compute.itemsize
        needs = needs_of(modules)
        with reading(checkpoints, needs, self.session) as reader:
            workers = WorkerPool(self.settings.max_memory, DeviceBuffers.dealt(self.spec, reader), reader.stop)

            def one(name: str, buffers: DeviceBuffers) -> Any:
                workers.check()
                with workers.holding(modules[name].cost(width)), buffers.working():
                    result = task(name, buffers)
                reader.done(name)
                self._advance(modules[name].nbytes)
                return result

            return workers.run(self.settings.workers, [partial(one, name) for name in needs])

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self.settings.on_progress:
            self.settings.on_progress(min(self.done, self.total), self.total)


@dataclass
class Measured:
    """The figures of one step: facts by module, and of vectors."""

    facts: Mapping[str, Mapping[str, Any]]
    totals: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0))
    """Over all matrices: ‖W‖², ‖ΔW‖² and the loss by rounding."""


def measure_step(
    pairing: PairedTensors, checkpoints: Sequence[Checkpoint], measuring: Measuring, label: str
) -> tuple[Measured, list[MovedVector]]:
    """Measure all matrices of one step, and the vectors that moved."""
    modules = {module.name: module for module in pairing.modules}
    order = list(needs_of(modules))
    results = measuring.run(modules, checkpoints, lambda name, buffers: measure_module(modules[name], buffers))
    facts = dict(zip(order, results, strict=True))
    sums = [math.fsum(fact["squares"][k] for fact in facts.values()) for k in range(3)]
    measured = Measured({name: facts[name] for name in modules}, (sums[0], sums[1], sums[2]))
    return measured, _vectors(pairing.vectors, checkpoints, measuring, label)


def _vectors(
    items: Sequence[Item], checkpoints: Sequence[Checkpoint], measuring: Measuring, label: str
) -> list[MovedVector]:
    """Return the vectors that moved, and how far."""
    modules = {item.name: AnalysedModule(item) for item in items if 0 not in item.shape}
    sizes = measuring.run(modules, checkpoints, lambda name, buffers: (name, *_vector_sizes(modules[name], buffers)))
    return [
        MovedVector(checkpoint=label, tensor=name, relative_change=change / size if size else None)
        for name, size, change in sorted(sizes)
        if change
    ]


def _vector_sizes(module: AnalysedModule, buffers: DeviceBuffers) -> tuple[float, float]:
    """Return ‖w‖ and ‖Δw‖."""
    blocks, squares = ModuleBlocks(module, buffers), torch.zeros(2, dtype=torch.float64)
    for start, stop in module.spans():
        W, _, D = blocks.change(start, stop)
        squares += torch.stack([torch.linalg.vector_norm(each).double().cpu().square() for each in (W, D)])
    size, change = squares.sqrt().tolist()
    return size, change


def measure_collision(
    pairings: Sequence[PairedTensors], checkpoints: Sequence[Checkpoint], measuring: Measuring
) -> list[Collision]:
    """Compare the changes of two steps on the modules that both change."""
    one, other = ({module.name: module for module in pairing.modules} for pairing in pairings)
    shared = {name: module for name, module in one.items() if name in other and _alike(module, other[name])}

    def task(name: str, buffers: DeviceBuffers) -> Collision:
        return collide(one[name], other[name], buffers)

    results = measuring.run(shared, checkpoints, task)
    found = {collision.module: collision for collision in results}
    return [found[name] for name in shared]


def _alike(one: AnalysedModule, other: AnalysedModule) -> bool:
    """Return True if two changes are of one matrix, block by block."""
    return one.rows == other.rows and one.experts == other.experts
