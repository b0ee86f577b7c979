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

import torch
from torch import Tensor

from ..adapters.new_adapter import Files, NewAdapter
from ..engine.device_buffers import DeviceBuffers
from ..engine.executor import Budget, WorkerPool
from ..engine.memory import as_bytes
from ..engine.precision import TORCH, ComputeSpec
from ..engine.preflight import chunks, holds_numbers, scan_adapter
from ..engine.resume import earlier_run, entered, journal_key, settle
from ..errors import NumericalError
from ..maths import lora as maths
from ..output.card import NAME
from ..output.folder import OutputFolder
from ..output.side_files import tokenizer_files
from ..settings import Settings
from ..sizes import format_size
from ..storage import spool as undo
from ..storage.journal import NAME as JOURNAL
from ..storage.journal import Journal, Record
from ..storage.reader import Reader
from ..storage.safetensors import BITS, FLOATS, StoredTensor
from ..storage.schema import count
from ..storage.spool import Part, Segment, Spool
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
    plan: FittingPlan,
    folder: OutputFolder,
    settings: Settings,
    reader: Reader,
    *,
    fit: FitJob,
    assemble: Assemble,
) -> FittingRun:
    """Fit the modules of a plan, and publish the adapters.

    Raises UsageError for a device or a budget that does not suffice, NumericalError for NaN, Inf and
    overflow, OutputError for a full disk. OUT does not exist then.
    """
    spec = settle(plan.memory, settings)
    settings.notify(
        f"memory: at most {format_size(settings.max_memory)}; one module takes {format_size(plan.memory)}"
    )
    adapters = [scan_adapter(plan.like)] if plan.like else []
    folder.check_space(2 * plan.bytes_out)
    with entered(folder):
        terms = {**plan.terms, "command": plan.command, "format": plan.format.NAME, "dtype": plan.dtype}
        key = journal_key(spec, folder.identity(plan.bases), adapters=adapters, **terms)
        earlier = earlier_run(folder, key, [], lambda: True, ENTERED)
        records = earlier.records if earlier else []
        with ExitStack() as stack:
            run = _Run(plan, settings, reader, {record["made"]: record for record in records})
            run.spool = stack.enter_context(closing(Spool(folder.record / undo.SPOOL, run.end)))
            with closing(Journal(folder.record / JOURNAL, key, earlier)) as run.journal:
                run.execute(fit, spec)
            results = run.results()
            written = sum(
                run.write(where, plan.format.save(adapter), folder)
                for where, adapter in assemble(results).items()
            )
            _put_side_files(plan, folder, settings)
        folder.publish()
    return FittingRun(results, spec, bool(records), written)


ENTERED = {
    "made": str,
    "tensors": {str: (frozenset(BITS), [count], (count, count))},
    "facts": {"change": float, "lost": float},
}
"""The form of a journal's records."""


@dataclass
class _Run:
    """The jobs of a plan, and the records of those that are done."""

    plan: FittingPlan
    settings: Settings
    reader: Reader
    records: dict[str, Record]
    spool: Spool = field(init=False)
    journal: Journal = field(init=False)
    _read: int = 0
    _total: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def end(self) -> int:
        """Bytes of the spool in use."""
        pieces = [tensor[2] for record in self.records.values() for tensor in record["tensors"].values()]
        return max((start + length for start, length in pieces), default=0)

    def execute(self, fit: FitJob, spec: ComputeSpec) -> None:
        """Run every job that is not done yet."""
        budget, pool = Budget(self.settings.max_memory), WorkerPool(spec, self.reader)

        def one(job: Job, buffers: DeviceBuffers) -> None:
            with budget.holding(job.cost):
                pool.check()
                with buffers.working():
                    self._keep(job, fit(job, buffers))
            self.reader.done(job.name)

        for name in self.records:
            self.reader.done(name)
        todo = [
            job for job in sorted(self.plan.jobs, key=lambda job: job.reads) if job.name not in self.records
        ]
        self._total = sum(job.nbytes for job in self.plan.jobs)
        self._read = self._total - sum(job.nbytes for job in todo)
        pool.run(self.settings.workers, [partial(one, job) for job in todo])

    def _keep(self, job: Job, fitted: Fitted) -> None:
        """Write a job's tensors to the spool, and enter them in the journal."""
        tensors = {}
        for role, tensor in fitted.tensors.items():
            host = tensor.detach().cpu().contiguous()
            if not maths.all_finite(host):
                raise NumericalError(f"{job.name} comes out as NaN or Inf.", hint="is the base damaged?")
            tensors[role] = [NAMES[host.dtype], list(host.shape), self.spool.add(as_bytes(host))]
        record = {"made": job.name, "tensors": tensors, "facts": dict(fitted.facts)}
        self.records[job.name] = record
        self.journal.add(record, [self.spool.descriptor])
        with self._lock:
            self._read += job.nbytes
            if self.settings.on_progress:
                self.settings.on_progress(self._read, self._total)

    def results(self) -> dict[str, Result]:
        """Return the results in the order of the jobs; their tensors lie in the spool."""
        return {job.name: _result(self.records[job.name], self.spool) for job in self.plan.jobs}

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


def _result(record: Record, spool: Spool) -> Result:
    """Return a job's result from its record."""
    tensors = {
        role: StoredTensor(f"{record['made']} {role}", dtype, tuple(shape), spool.path, piece[0])
        for role, (dtype, shape, piece) in record["tensors"].items()
    }
    return Result(tensors, record["facts"])


def _part(name: str, stored: StoredTensor, dtype: str, spool: Spool, reader: Reader) -> Part:
    """Return a tensor as a part of the spool; a checkpoint's tensor is copied there, chunk by chunk."""
    if stored.path == spool.path and stored.dtype == dtype:
        return Part(name, dtype, stored.shape, (Segment(stored.start, stored.nbytes),))
    pieces = []
    for chunk in chunks(stored, reader):
        if not holds_numbers(chunk, stored.dtype):
            raise NumericalError(
                f"{stored.name} of {stored.path.name} holds NaN or Inf.", hint="the file is damaged"
            )
        pieces.append(
            spool.add(memoryview(chunk) if stored.dtype == dtype else _converted(chunk, stored, dtype))
        )
    return Part(name, dtype, stored.shape, tuple(pieces))


def _converted(chunk: bytearray, stored: StoredTensor, dtype: str) -> memoryview:
    """Return elements rounded once to another dtype; NumericalError for an overflow."""
    x = torch.frombuffer(chunk, dtype=TORCH[stored.dtype]).double()
    return as_bytes(rounded(x, TORCH[dtype], stored.name))


def rounded(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return x rounded once to a dtype; NumericalError for an overflow."""
    y = maths.round_to(x.contiguous(), torch.empty(x.shape, dtype=dtype, device=x.device))
    if not maths.all_finite(y) and maths.all_finite(x):
        raise NumericalError(
            f"{name} overflows {NAMES[dtype]}.", hint="--dtype bfloat16 or float32 has the range"
        )
    return y


def _put_side_files(plan: FittingPlan, folder: OutputFolder, settings: Settings) -> None:
    """Write the model card, and the tokenizer of the last input."""
    source = plan.sources[-1].path
    for name in tokenizer_files(source) if source.is_dir() else ():
        folder.put(name, source / name)
    folder.put(NAME, adapter_card_bytes(plan, settings.base_model))
