"""A run of a plan, from what an unfinished one has left to the check of what was written; merges and their undoing alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import Fault, VerificationError
from ..output.finished import ENTERED, Progress, TensorResult, Verdict
from ..output.output import Output
from ..output.shards import ShardFiles
from ..plan.plan import Plan
from ..settings import Settings
from ..storage import spool as undo
from ..storage.journal import NAME as JOURNAL
from ..storage.journal import Journal, Record, UnfinishedRun
from ..storage.reader import Reader
from ..storage.spool import Spool
from .executor import Budget, Checker, Run
from .precision import ComputeSpec
from .resume import earlier_run, journal_key
from .tensor import MakeTensor

Hashes = Sequence[Mapping[str, str]]


class Transfers(Protocol):
    """What comes from the Hub and goes to it while a plan runs."""

    local: bool
    """True if the output stays on this machine."""

    def reader(self) -> Reader:
        """Return a reader that waits for files on their way."""

    def attach(self, files: ShardFiles) -> None:
        """Take the open shards of the output."""

    def shard_finished(self, shard: str) -> None:
        """Note that a shard is finished, and right as far as it is checked; called by workers."""

    def settle(self) -> None:
        """Wait until all finished shards are uploaded."""


@dataclass(frozen=True)
class RunOptions:
    """What a verb adds to a plan so that it can be run."""

    make: MakeTensor
    check: Callable[[Path, Plan, Reader], Checker] | None = None
    """Starts the check of a written folder; None for no check."""
    hub: Transfers | None = None
    hashed: Collection[str] = ()
    """Names of copied tensors whose hashes are wanted."""


def run_key(plan: Plan, output: Output, hashes: Hashes, spec: ComputeSpec) -> Record:
    """Return everything that decides the output's bytes."""
    adapters = [dict(found) for found in hashes]
    return journal_key(spec, output.identity([plan.base]), plan=plan.fingerprint, adapters=adapters)


def earlier(output: Output, plan: Plan, key: Record) -> UnfinishedRun | None:
    """Return the journal of an unfinished run of the same key; the output is then ready to go on, else empty."""
    names = [shard.filename for shard in plan.shards]
    return earlier_run(output, key, names, lambda: output.resumable(plan), ENTERED)


def run(
    plan: Plan,
    output: Output,
    settings: Settings,
    spec: ComputeSpec,
    journal: tuple[Record, UnfinishedRun | None],
    options: RunOptions,
) -> Run:
    """Make every tensor that is not made yet; when this returns, all bytes and the journal are synced.

    `journal` is the key of this run, and the unfinished run that it resumes.
    """
    (key, unfinished), hub = journal, options.hub
    progress = Progress.of(unfinished.records if unfinished else ())
    with ExitStack() as stack:
        reader = stack.enter_context(closing(hub.reader() if hub else Reader()))
        spool = stack.enter_context(closing(Spool(output.record / undo.SPOOL, progress.spooled)))
        sparse = hub is not None and not hub.local
        shards = stack.enter_context(closing(output.open_shards(plan, new=unfinished is None, sparse=sparse)))
        if hub:
            hub.attach(shards)
        output.sync()
        running = Run(
            plan,
            shards,
            reader,
            spool,
            stack.enter_context(closing(Journal(output.record / JOURNAL, key, unfinished))),
            spec,
            Budget(settings.max_memory),
            options.make,
            options.check(output.partial, plan, reader) if options.check else None,
            settings.on_progress,
            progress,
            on_shard=hub.shard_finished if hub else None,
            output=output,
            hashed=options.hashed,
            tight=settings.workers * plan.memory > settings.max_memory,
        )
        running.execute(settings.workers)
        if hub:
            hub.settle()
    return running


def judge(plan: Plan, done: Mapping[str, TensorResult]) -> Verdict:
    """The sum of all checks; VerificationError naming every tensor that is wrong."""
    total, faults = Verdict(), []
    for item in plan.items:
        if item.name in done and (found := done[item.name].verdict):
            total += found
            if found.wrong:
                why = f"{found.wrong} of {found.checked} elements, up to {found.max_ulp} ulp"
                faults.append(Fault(item.name, why))
    if faults:
        raise VerificationError(
            f"The self-check failed: {len(faults)} tensors on disk are not what was computed.",
            faults=faults,
            hint="the disk or the memory may be faulty; the same command makes these tensors again",
        )
    return total
