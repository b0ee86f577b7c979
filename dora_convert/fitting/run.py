"""Run a fitting plan: fit each module within the memory budget, then write and publish the adapters.

Fitted tensors go to a spool, and into the journal once they are synced, so that the same command resumes an
interrupted run. Names and config are written at the end, when ranks are known.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..adapters.new_adapter import Files, NewAdapter, ShapedTensor
from ..engine.device_buffers import DeviceBuffers
from ..engine.precision import TORCH, ComputeSpec, as_bytes, holds_numbers, scan_adapter
from ..engine.run import choose_compute, journal_key
from ..engine.workers import WorkerPool
from ..errors import NumericalError
from ..maths import lora as maths
from ..output.folder import OutputFolder
from ..output.output import input_states
from ..settings import Settings, format_size, peak_memory
from ..storage.filenames import JOURNAL, SPOOL, refuse_changed
from ..storage.journal import Journal
from ..storage.json_files import Real
from ..storage.reader import Reader
from ..storage.safetensors import FLOATS, StoredTensor
from ..storage.spool import Segment, Spool, SpooledTensor
from .card import put_side_files
from .jobs import FittingPlan, Job, Result, needs_of
from .shaping import shaped_values, write_instead

NAMES = {dtype: name for name, dtype in TORCH.items()}

FitJob = Callable[..., "Fitted"]
"""Fits one job, with a worker's buffers; if asked, for another `goal` than the plan's."""
Inputs = Callable[[Mapping[str, Collection[Path]]], AbstractContextManager[Reader]]
"""Opens a reader for the files that each job reads."""
Assemble = Callable[[Mapping[str, Result]], Mapping[str, NewAdapter]]
"""Makes adapters of the results, by their sub-folders of OUT."""


@dataclass(frozen=True)
class Fitted:
    """A job's tensors, as they will be stored, and the numbers for the report (JSON values)."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def run_plan(
    plan: FittingPlan, folder: OutputFolder, settings: Settings, inputs: Inputs, *, fit: FitJob, assemble: Assemble
) -> tuple[dict[str, Result], dict[str, Any]]:
    """Fit the modules of a plan, and publish the adapters; return the results, and fields of the report.

    Raises UsageError for a device or a budget that does not suffice, NumericalError for NaN, Inf and
    overflow, OutputError for a full disk. OUT does not exist then.
    """
    spec = choose_compute(plan.memory, settings)
    if plan.memory:  # none for a format that copies factors
        most, module = format_size(settings.max_memory), format_size(plan.memory)
        settings.notify(f"memory: at most {most}; one module takes {module}")
    adapters = [scan_adapter(adapter) for adapter in plan.adapters]
    folder.check_space((3 if plan.one_rank else 2) * plan.bytes_out)
    read = input_states(folder, plan.bases, plan.adapters)
    with folder.entered(*read):
        terms = {**plan.terms, "goal": plan.goal, "command": plan.command, "format": plan.format.NAME}
        terms |= {"one_rank": plan.one_rank, "dtype": plan.dtype}
        key = journal_key(spec, folder.identity(plan.bases), adapters=adapters, **terms)
        unfinished = folder.resume(key, [], lambda: True, FittedLine)
        lines = {line.made: line for line in unfinished.lines} if unfinished else {}
        resumed = bool(lines)
        if lines:
            settings.notify(f"resumed: {len(lines)} of {len(plan.jobs)} modules were finished before")
        end = max((tensor.end for line in lines.values() for tensor in line.tensors.values()), default=0)
        with closing(Spool(folder.state / SPOOL, end)) as spool, ExitStack() as stack:
            with closing(Journal(folder.state / JOURNAL, key, unfinished)) as journal:
                run = _Run(plan, settings, spec, spool=spool, journal=journal, lines=lines)
                todo = run.unfinished()
                with inputs(needs_of(todo)) as reader:
                    run.execute(todo, fit, reader)
                rank = max((line.facts["rank"] for line in lines.values()), default=0)
                todo = run.smaller(rank) if plan.one_rank else []
                reader = stack.enter_context(inputs({**needs_of(todo), "": plan.carried}))
                run.execute(todo, partial(_fit_at, fit, rank), reader)
            results = {job.name: _result(lines[job.name], spool) for job in plan.jobs}
            writer, adapters_out = plan.format.writer(), assemble(results).items()
            written = sum(run.write(where, writer.save(each), folder, reader) for where, each in adapters_out)
            put_side_files(plan, folder, settings)
        refuse_changed(*read)
        folder.publish()
    facts = {"device": spec.title, "compute_dtype": spec.compute_name, "peak_memory_bytes": peak_memory()}
    return results, {**facts, "bytes_written": written, "resumed": resumed}


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
    spec: ComputeSpec
    spool: Spool
    journal: Journal
    lines: dict[str, FittedLine]
    _read: int = 0
    _total: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def unfinished(self) -> list[Job]:
        """Return the jobs that are not done yet."""
        todo = [job for job in self.plan.jobs if job.name not in self.lines]
        self._read = sum(job.nbytes for job in self.plan.jobs) - sum(job.nbytes for job in todo)
        self._total = self._read
        return todo

    def smaller(self, rank: int) -> list[Job]:
        """Return the jobs that found factors of a smaller rank."""
        return [job for job in self.plan.jobs if 0 < self.lines[job.name].facts["rank"] < rank]

    def execute(self, jobs: Collection[Job], fit: FitJob, reader: Reader) -> None:
        """Run some jobs, those that read the same file together."""
        workers = WorkerPool(self.settings.max_memory, DeviceBuffers.dealt(self.spec, reader), reader.stop)
        self._total += sum(job.nbytes for job in jobs)

        def one(job: Job, buffers: DeviceBuffers) -> None:
            with workers.holding(job.cost):
                workers.check()
                with buffers.working():
                    self._keep(job, fit(job, buffers))
            reader.done(job.name)

        if self.spec.staged:
            from ..engine.device_plan import load_solvers

            load_solvers(self.spec)
        todo = sorted(jobs, key=lambda job: job.reads)
        workers.run(self.settings.workers, [partial(one, job) for job in todo])

    def _keep(self, job: Job, fitted: Fitted) -> None:
        """Write a job's tensors to the spool, and enter them in the journal."""
        if not all(math.isfinite(fact) for fact in fitted.facts.values() if isinstance(fact, float)):
            raise NumericalError(f"{job.name}: the change overflows float64.", hint="is the adapter's scaling right?")
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

    def write(self, where: str, files: Files, folder: OutputFolder, reader: Reader) -> int:
        """Write one adapter's files; return the bytes of its tensors."""
        for name, data in files.small.items():
            folder.put(f"{where}{name}", data)
        parts = []
        for name, stored in files.tensors.items():
            dtype = self.plan.dtype if stored.dtype in FLOATS and name not in files.keep else None
            make = self._shaped if isinstance(stored, ShapedTensor) else self._part
            parts.append(make(name, stored, dtype or stored.dtype, reader))  # type: ignore[arg-type] # its own kind
        path = folder.partial / f"{where}{files.weights}"
        self.spool.lay_out(parts, path, files.metadata)
        if path.suffix != ".safetensors":
            write_instead(path, files.metadata)
        return sum(segment.length for part in parts for segment in part.segments)

    def _part(self, name: str, stored: StoredTensor, dtype: str, reader: Reader) -> SpooledTensor:
        """Return a tensor as a part of the spool; a checkpoint's tensor is copied there, piece by piece."""
        if stored.path == self.spool.path and stored.dtype == dtype and not stored.is_view:
            return SpooledTensor(name, dtype, stored.shape, (Segment(stored.start, stored.nbytes),))
        pieces = []
        for piece in reader.pieces(stored):
            chunk = memoryview(bytearray(piece)) if piece.readonly else piece
            if not holds_numbers(chunk, stored.dtype):
                raise NumericalError(
                    f"{stored.name} of {stored.path.name} holds NaN or Inf.", hint="the file is damaged"
                )
            pieces.append(self.spool.add(chunk if stored.dtype == dtype else _converted(chunk, stored, dtype)))
        return SpooledTensor(name, dtype, stored.shape, tuple(pieces))

    def _shaped(self, name: str, tensor: ShapedTensor, dtype: str, reader: Reader) -> SpooledTensor:
        """Return a scaled or padded tensor as a part of the spool."""
        values = rounded(shaped_values(tensor, reader), dtype, name)
        return SpooledTensor(name, dtype, tensor.shape, (self.spool.add(as_bytes(values)),))


def _fit_at(fit: FitJob, rank: int, job: Job, buffers: DeviceBuffers) -> Fitted:
    """Return factors of exactly this rank: zeros fill the rank that a module cannot have."""
    fitted = fit(job, buffers, goal={"rank": rank})
    A, B, own = fitted.tensors["A"], fitted.tensors["B"], fitted.facts["rank"]
    A, B = A.view(-1, own, *A.shape[1:]), B.reshape(len(B), own, -1)  # experts, if any: first in A and last in B
    A = torch.cat((A, A.new_zeros(len(A), rank - own, *A.shape[2:])), dim=1).flatten(0, 1)
    B = torch.cat((B, B.new_zeros(len(B), rank - own, B.shape[2])), dim=1)
    B = B.reshape(len(B), -1, *fitted.tensors["B"].shape[2:])
    return Fitted({**fitted.tensors, "A": A, "B": B}, {**fitted.facts, "rank": rank})


def _result(line: FittedLine, spool: Spool) -> Result:
    """Return a job's result from its line of the journal."""
    tensors = {
        role: StoredTensor(each.name, each.dtype, each.shape, spool.path, each.segments[0].start)
        for role, each in line.tensors.items()
    }
    return Result(tensors, line.facts)


def _converted(chunk: memoryview, stored: StoredTensor, dtype: str) -> memoryview:
    """Return elements rounded once to another dtype; NumericalError for an overflow."""
    return as_bytes(rounded(torch.frombuffer(chunk, dtype=TORCH[stored.dtype]).double(), dtype, stored.name))


def rounded(x: Tensor, dtype: str | None, name: str) -> Tensor:
    """Return x rounded once to a dtype, by default float32; NumericalError for an overflow."""
    dtype = dtype or "F32"
    y = maths.round_to(x.contiguous(), torch.empty(x.shape, dtype=TORCH[dtype], device=x.device))
    if not maths.all_finite(y) and maths.all_finite(x):
        raise NumericalError(f"{name} overflows {dtype}.", hint="--dtype bfloat16 or float32 has the range")
    return y
