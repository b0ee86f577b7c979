"""Carry an order out: make each module's tensors within the budget, then write, and publish, the adapters they are for.

What is made goes to a spool, and is entered in the journal once it is synced, so that the same command continues an
unfinished run; names and config are made at the end, when ranks are known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..adapters.new_adapter import Files
from ..engine.device_buffers import DeviceBuffers
from ..engine.host_memory import as_bytes
from ..engine.precision import TORCH, ComputeSpec
from ..engine.preflight import holds_numbers, scan_adapter
from ..engine.run import choose_compute, entered, journal_key, resume
from ..engine.workers import WorkerPool
from ..errors import NumericalError
from ..maths import lora as maths
from ..output.card import NAME
from ..output.folder import OutputFolder
from ..output.side_files import tokenizer_files
from ..settings import Settings
from ..sizes import format_size
from ..storage.filenames import JOURNAL, SPOOL
from ..storage.journal import Journal
from ..storage.json_files import Real
from ..storage.reader import Reader
from ..storage.safetensors import FLOATS, StoredTensor
from ..storage.spool import Segment, Spool, SpooledTensor
from .card import adapter_card_bytes
from .jobs import Assemble, FittingPlan, Job, Result

NAMES = {dtype: name for name, dtype in TORCH.items()}


@dataclass(frozen=True)
class Made:
    """A job's tensors, as they are to be stored, and what the report says of it (JSON values)."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass
class FittingRun:
    """A run that is over."""

    results: Mapping[str, Result]
    spec: ComputeSpec
    resumed: bool
    written: int


def craft(
    order: FittingPlan,
    folder: OutputFolder,
    settings: Settings,
    work: Callable[[Any, DeviceBuffers], Made],
    assemble: Assemble,
    reader: Reader,
) -> FittingRun:
    """Make and publish an adapter of what a reader reads.

    Raises UsageError for a device or a budget that will not do, NumericalError for NaN, Inf and overflow, OutputError
    for a disk that does not take the result. OUT does not exist then.
    """
    spec = choose_compute(order.memory, settings)
    settings.notify(
        f"memory: at most {format_size(settings.max_memory)}; one module takes {format_size(order.memory)}"
    )
    adapters = [scan_adapter(order.like)] if order.like else []
    folder.check_space(2 * order.bytes_out)
    with entered(folder):
        terms = {**order.terms, "command": order.command, "format": order.format.NAME, "dtype": order.dtype}
        key = journal_key(spec, folder.identity(order.bases), adapters=adapters, **terms)
        earlier = resume(folder, key, [], lambda: True, FittedLine)
        lines = earlier.lines if earlier else []
        with ExitStack() as stack:
            run = _Run(order, settings, reader, {line.made: line for line in lines})
            run.spool = stack.enter_context(closing(Spool(folder.state / SPOOL, run.end)))
            with closing(Journal(folder.state / JOURNAL, key, earlier)) as run.journal:
                run.execute(work, spec)
            results = run.results()
            written = sum(
                _write(where, order.format.save(made), order, folder, run.spool, reader)
                for where, made in assemble(results).items()
            )
            _put_side_files(order, folder, settings)
        folder.publish()
    return FittingRun(results, spec, bool(lines), written)


class FittedLine(msgspec.Struct, frozen=True):
    """A line of the journal: a job's tensors in the spool, by role, and its facts."""

    made: str
    tensors: dict[str, SpooledTensor]
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("change", "lost"):
            msgspec.convert(self.facts.get(name), Real)
        if not all(tensor.whole and tensor.segments for tensor in self.tensors.values()):
            raise ValueError("a tensor is too long or too short")


@dataclass
class _Run:
    """The jobs of an order: what is made of them, and in which piece of the spool it is."""

    order: FittingPlan
    settings: Settings
    reader: Reader
    made: dict[str, FittedLine]
    spool: Spool = field(init=False)
    journal: Journal = field(init=False)
    _read: int = 0
    _total: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def end(self) -> int:
        """How much of the spool is in use."""
        return max((each.end for line in self.made.values() for each in line.tensors.values()), default=0)

    def execute(self, work: Callable[[Any, DeviceBuffers], Made], spec: ComputeSpec) -> None:
        """Do every job that is not done yet."""
        start = partial(DeviceBuffers, spec, self.reader)
        workers = WorkerPool(self.settings.max_memory, start, self.reader.stop)

        def one(job: Job, buffers: DeviceBuffers) -> None:
            with workers.holding(job.cost):
                workers.check()
                with buffers.working():
                    self._keep(job, work(job, buffers))
            self.reader.done(job.name)

        for name in self.made:
            self.reader.done(name)
        todo = [
            job for job in sorted(self.order.jobs, key=lambda job: job.reads) if job.name not in self.made
        ]
        self._total = sum(job.nbytes for job in self.order.jobs)
        self._read = self._total - sum(job.nbytes for job in todo)
        workers.run(self.settings.workers, [partial(one, job) for job in todo])

    def _keep(self, job: Job, made: Made) -> None:
        """Bring a job's tensors to the spool, and enter them."""
        tensors = {}
        for role, tensor in made.tensors.items():
            host = tensor.detach().cpu().contiguous()
            if not maths.all_finite(host):
                raise NumericalError(f"{job.name} comes out as NaN or Inf.", hint="is the base damaged?")
            segments = (self.spool.add(as_bytes(host)),)
            name = f"{job.name} {role}"
            tensors[role] = SpooledTensor(name, NAMES[host.dtype], tuple(host.shape), segments)
        self.made[job.name] = line = FittedLine(job.name, tensors, dict(made.facts))
        self.journal.add(line, [self.spool.descriptor])
        with self._lock:
            self._read += job.nbytes
            if self.settings.on_progress:
                self.settings.on_progress(self._read, self._total)

    def results(self) -> dict[str, Result]:
        """What is made, in the order of the jobs: tensors that lie in the spool."""
        return {job.name: _result(self.made[job.name], self.spool) for job in self.order.jobs}


def _result(line: FittedLine, spool: Spool) -> Result:
    tensors = {
        role: StoredTensor(each.name, each.dtype, each.shape, spool.path, each.segments[0].start)
        for role, each in line.tensors.items()
    }
    return Result(tensors, line.facts)


def _write(
    where: str, files: Files, order: FittingPlan, folder: OutputFolder, spool: Spool, reader: Reader
) -> int:
    """One adapter's files; the bytes of its tensors."""
    for name, data in files.small.items():
        folder.put(f"{where}{name}", data)
    parts = []
    for name, stored in files.tensors.items():
        dtype = order.dtype if stored.dtype in FLOATS and name not in files.keep else None
        parts.append(_part(name, stored, dtype or stored.dtype, spool, reader))
    spool.lay_out(parts, folder.partial / f"{where}{files.weights}", files.metadata)
    return sum(segment.length for part in parts for segment in part.segments)


def _part(name: str, stored: StoredTensor, dtype: str, spool: Spool, reader: Reader) -> SpooledTensor:
    """A tensor as a part of the spool: it lies there already, or is copied, chunk by chunk."""
    if stored.path == spool.path and stored.dtype == dtype:
        return SpooledTensor(name, dtype, stored.shape, (Segment(stored.start, stored.nbytes),))
    pieces = []
    for chunk in reader.pieces(stored):
        if not holds_numbers(chunk, stored.dtype):
            raise NumericalError(
                f"{stored.name} of {stored.path.name} holds NaN or Inf.", hint="the file is damaged"
            )
        pieces.append(spool.add(chunk if stored.dtype == dtype else _converted(chunk, stored, dtype)))
    return SpooledTensor(name, dtype, stored.shape, tuple(pieces))


def _converted(chunk: memoryview, stored: StoredTensor, dtype: str) -> memoryview:
    """Elements rounded once to another dtype; NumericalError for what it cannot hold."""
    x = torch.frombuffer(chunk, dtype=TORCH[stored.dtype]).double()
    return as_bytes(rounded(x, TORCH[dtype], stored.name))


def rounded(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """x rounded once to a dtype; NumericalError where that has not the range for it."""
    y = maths.round_to(x.contiguous(), torch.empty(x.shape, dtype=dtype, device=x.device))
    if not maths.all_finite(y) and maths.all_finite(x):
        raise NumericalError(
            f"{name} overflows {NAMES[dtype]}.", hint="--dtype bfloat16 or float32 has the range"
        )
    return y


def _put_side_files(order: FittingPlan, folder: OutputFolder, settings: Settings) -> None:
    """What lies beside the adapter: its model card, and the tokenizer of what it is made from."""
    source = order.sources[-1].path
    for name in tokenizer_files(source) if source.is_dir() else ():
        folder.put(name, source / name)
    folder.put(NAME, adapter_card_bytes(order, settings.base_model))
