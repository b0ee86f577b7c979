"""Run a fitting plan: fit each module within the memory budget, then write and publish the adapters.

Fitted tensors go to a spool, and into the journal once they are synced, so that the same command resumes an
interrupted run. Names and config are written at the end, when ranks are known.
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

from ..adapters.new_adapter import Files, NewAdapter
from ..engine.device_buffers import DeviceBuffers
from ..engine.host_memory import as_bytes
from ..engine.precision import TORCH, ComputeSpec
from ..engine.preflight import holds_numbers, scan_adapter
from ..engine.run import choose_compute, entered, input_states, journal_key, resume
from ..engine.workers import WorkerPool
from ..errors import NumericalError
from ..maths import lora as maths
from ..output.card import NAME
from ..output.folder import OutputFolder
from ..output.side_files import tokenizer_files
from ..settings import Settings
from ..sizes import format_size
from ..storage.changes import refuse_changed
from ..storage.filenames import JOURNAL, SPOOL
from ..storage.journal import Journal
from ..storage.json_files import Real
from ..storage.reader import Reader
from ..storage.safetensors import FLOATS, StoredTensor
from ..storage.spool import Segment, Spool, SpooledTensor
from .card import adapter_card_bytes
from .jobs import FittingPlan, Job, Result

NAMES = {dtype: name for name, dtype in TORCH.items()}


FitJob = Callable[[Any, DeviceBuffers], "Fitted"]
"""Fits one job."""
Assemble = Callable[[Mapping[str, Result]], Mapping[str, NewAdapter]]
"""Makes adapters of the results, by their sub-folders of OUT."""


@dataclass(frozen=True)
class Fitted:
    """A job's tensors, as they will be stored, and the numbers for the report (JSON values)."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass
class FittingRun:
    """A finished run."""

    results: Mapping[str, Result]
    spec: ComputeSpec
    resumed: bool
    written: int


def run_plan(
    plan: FittingPlan, folder: OutputFolder, settings: Settings, reader: Reader, *, fit: FitJob, assemble: Assemble
) -> FittingRun:
    """Fit the modules of a plan, and publish the adapters.

    Raises UsageError for a device or a budget that does not suffice, NumericalError for NaN, Inf and
    overflow, OutputError for a full disk. OUT does not exist then.
    """
    spec = choose_compute(plan.memory, settings)
    settings.notify(f"memory: at most {format_size(settings.max_memory)}; one module takes {format_size(plan.memory)}")
    adapters = [scan_adapter(plan.like)] if plan.like else []
    folder.check_space(2 * plan.bytes_out)
    inputs = input_states(folder, plan.bases, [plan.like] if plan.like else [])
    with entered(folder, *inputs):
        terms = {**plan.terms, "command": plan.command, "format": plan.format.NAME, "dtype": plan.dtype}
        key = journal_key(spec, folder.identity(plan.bases), adapters=adapters, **terms)
        unfinished = resume(folder, key, [], lambda: True, FittedLine)
        lines = unfinished.lines if unfinished else []
        with ExitStack() as stack:
            run = _Run(plan, settings, reader, {line.made: line for line in lines})
            run.spool = stack.enter_context(closing(Spool(folder.state / SPOOL, run.end)))
            with closing(Journal(folder.state / JOURNAL, key, unfinished)) as run.journal:
                run.execute(fit, spec)
            results = run.results()
            written = sum(
                run.write(where, plan.format.save(adapter), folder) for where, adapter in assemble(results).items()
            )
            _put_side_files(plan, folder, settings)
        refuse_changed(*inputs)
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
    """The jobs of a plan, and the journal lines of the finished ones."""

    plan: FittingPlan
    settings: Settings
    reader: Reader
    lines: dict[str, FittedLine]
    spool: Spool = field(init=False)
    journal: Journal = field(init=False)
    _read: int = 0
    _total: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def end(self) -> int:
        """Bytes of the spool in use."""
        return max((tensor.end for line in self.lines.values() for tensor in line.tensors.values()), default=0)

    def execute(self, fit: FitJob, spec: ComputeSpec) -> None:
        """Run every job that is not done yet."""
        start = partial(DeviceBuffers, spec, self.reader)
        workers = WorkerPool(self.settings.max_memory, start, self.reader.stop)

        def one(job: Job, buffers: DeviceBuffers) -> None:
            with workers.holding(job.cost):
                workers.check()
                with buffers.working():
                    self._keep(job, fit(job, buffers))
            self.reader.done(job.name)

        for name in self.lines:
            self.reader.done(name)
        todo = [job for job in sorted(self.plan.jobs, key=lambda job: job.reads) if job.name not in self.lines]
        self._total = sum(job.nbytes for job in self.plan.jobs)
        self._read = self._total - sum(job.nbytes for job in todo)
        workers.run(self.settings.workers, [partial(one, job) for job in todo])

    def _keep(self, job: Job, fitted: Fitted) -> None:
        """Write a job's tensors to the spool, and enter them in the journal."""
        tensors = {}
        for role, tensor in fitted.tensors.items():
            host = tensor.detach().cpu().contiguous()
            if not maths.all_finite(host):
                raise NumericalError(f"{job.name} comes out as NaN or Inf.", hint="is the base damaged?")
            name, segments = f"{job.name} {role}", (self.spool.add(as_bytes(host)),)
            tensors[role] = SpooledTensor(name, NAMES[host.dtype], tuple(host.shape), segments)
        self.lines[job.name] = line = FittedLine(job.name, tensors, dict(fitted.facts))
        self.journal.add(line, [self.spool.path])
        with self._lock:
            self._read += job.nbytes
            if self.settings.on_progress:
                self.settings.on_progress(self._read, self._total)

    def results(self) -> dict[str, Result]:
        """Return the results in the order of the jobs; their tensors lie in the spool."""
        return {job.name: _result(self.lines[job.name], self.spool) for job in self.plan.jobs}

    def write(self, where: str, files: Files, folder: OutputFolder) -> int:
        """Write one adapter's files; return the bytes of its tensors."""
        for name, data in files.small.items():
            folder.put(f"{where}{name}", data)
        parts = []
        for name, stored in files.tensors.items():
            dtype = self.plan.dtype if stored.dtype in FLOATS and name not in files.keep else None
            parts.append(_part(name, stored, dtype or stored.dtype, self.spool, self.reader))
        self.spool.lay_out(parts, folder.partial / f"{where}{files.weights}", files.metadata)
        return sum(segment.length for part in parts for segment in part.segments)


def _result(line: FittedLine, spool: Spool) -> Result:
    """Return a job's result from its line of the journal."""
    tensors = {
        role: StoredTensor(each.name, each.dtype, each.shape, spool.path, each.segments[0].start)
        for role, each in line.tensors.items()
    }
    return Result(tensors, line.facts)


def _part(name: str, stored: StoredTensor, dtype: str, spool: Spool, reader: Reader) -> SpooledTensor:
    """Return a tensor as a part of the spool; a checkpoint's tensor is copied there, piece by piece."""
    if stored.path == spool.path and stored.dtype == dtype:
        return SpooledTensor(name, dtype, stored.shape, (Segment(stored.start, stored.nbytes),))
    pieces = []
    for chunk in reader.pieces(stored):
        if not holds_numbers(chunk, stored.dtype):
            raise NumericalError(f"{stored.name} of {stored.path.name} holds NaN or Inf.", hint="the file is damaged")
        pieces.append(spool.add(chunk if stored.dtype == dtype else _converted(chunk, stored, dtype)))
    return SpooledTensor(name, dtype, stored.shape, tuple(pieces))


def _converted(chunk: memoryview, stored: StoredTensor, dtype: str) -> memoryview:
    """Return elements rounded once to another dtype; NumericalError for an overflow."""
    x = torch.frombuffer(chunk, dtype=TORCH[stored.dtype]).double()
    return as_bytes(rounded(x, TORCH[dtype], stored.name))


def rounded(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return x rounded once to a dtype; NumericalError for an overflow."""
    y = maths.round_to(x.contiguous(), torch.empty(x.shape, dtype=dtype, device=x.device))
    if not maths.all_finite(y) and maths.all_finite(x):
        raise NumericalError(f"{name} overflows {NAMES[dtype]}.", hint="--dtype bfloat16 or float32 has the range")
    return y


def _put_side_files(plan: FittingPlan, folder: OutputFolder, settings: Settings) -> None:
    """Write the model card, and the tokenizer of the last input."""
    source = plan.sources[-1].path
    for name in tokenizer_files(source) if source.is_dir() else ():
        folder.put(name, source / name)
    folder.put(NAME, adapter_card_bytes(plan, settings.base_model))
