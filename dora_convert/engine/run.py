"""A run of a plan, from what an unfinished one has left to the check of what was written; merges and their undoing alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing

from ..errors import Fault, VerificationError
from ..hub.streaming import HubStreaming
from ..output.finished import ENTERED, Progress, TensorResult
from ..output.in_place import InPlace
from ..output.shards import ShardFiles
from ..parity.self_check import Checker, Verdict
from ..plan.plan import Plan
from ..settings import Settings
from ..storage import spool as undo
from ..storage.journal import NAME as JOURNAL
from ..storage.journal import Journal, Record, UnfinishedRun
from ..storage.reader import Reader
from ..storage.spool import Spool
from .executor import Budget, Run
from .precision import ComputeSpec
from .resume import Folder, earlier_run, journal_key

Hashes = Sequence[Mapping[str, str]]


def run_key(plan: Plan, folder: Folder, hashes: Hashes, spec: ComputeSpec) -> Record:
    """Everything that decides the output's bytes."""
    adapters = [dict(found) for found in hashes]
    known = {"plan": plan.fingerprint, "adapters": adapters}
    if isinstance(folder, InPlace):  # whose files change while it runs
        return journal_key(spec, [], **known, place=str(folder.out.resolve()))
    return journal_key(spec, [plan.base], **known)


def earlier(folder: Folder, plan: Plan, key: Record) -> UnfinishedRun | None:
    """The journal of an unfinished run of the same key; OUT.partial is then ready to go on, else empty."""
    names = [shard.filename for shard in plan.shards]
    return earlier_run(folder, key, names, lambda: folder.resumable(plan), ENTERED)


def run(
    plan: Plan,
    folder: Folder,
    settings: Settings,
    spec: ComputeSpec,
    key: Record,
    earlier: UnfinishedRun | None,
    hub: HubStreaming | None = None,
    hashed: Collection[str] = (),
) -> Run:
    """Make every tensor that is not made yet; when this returns, all bytes and the journal are synced.

    Of copied tensors the `hashed` ones, by name, are hashed.
    """
    place = folder if isinstance(folder, InPlace) else None
    progress = Progress.of(earlier.records if earlier else ())
    with ExitStack() as stack:
        reader = stack.enter_context(closing(hub.reader() if hub else Reader()))
        spool = stack.enter_context(closing(Spool(folder.record / undo.SPOOL, progress.spooled)))
        shards = stack.enter_context(closing(_shards(folder, plan, hub, new=earlier is None)))
        folder.sync()
        journal = stack.enter_context(closing(Journal(folder.record / JOURNAL, key, earlier)))
        checker = Checker(folder.partial, plan, reader) if settings.verify else None
        budget = Budget(settings.max_memory)
        running = Run(
            plan,
            shards,
            reader,
            spool,
            journal,
            spec,
            budget,
            checker,
            settings.on_progress,
            progress,
            hub.made if hub else None,
            place,
            hashed,
            settings.workers * plan.memory > settings.max_memory,
        )
        running.execute(settings.workers)
        if hub:
            hub.settle()
    return running


def _shards(folder: Folder, plan: Plan, hub: HubStreaming | None, *, new: bool) -> ShardFiles:
    if isinstance(folder, InPlace):
        return ShardFiles(folder.partial, plan, create=False, places=folder.places)
    shards = ShardFiles(folder.partial, plan, create=new, sparse=bool(hub and not hub.local))
    if hub:
        hub.attach(shards)
    return shards


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
