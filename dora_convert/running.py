"""A run of a plan from settling its device to checking what was written; merges and their undoing alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch

from . import __version__, undo
from .checkpoint import RECORD, Checkpoint
from .errors import Fault, NumericalError, OutputError, UsageError, VerificationError
from .execute import Budget, Done, Progress, Run
from .folder import OutputFolder
from .in_place import InPlace
from .journal import NAME as JOURNAL
from .journal import Earlier, Journal, Record, read_journal
from .plan import Plan
from .precision import Choice, choose
from .selfcheck import Checker, Verdict
from .settings import Settings
from .sizes import format_size
from .stored import Reader
from .undo import Spool
from .writer import ShardFiles

Hashes = Sequence[Mapping[str, str]]
Folder = OutputFolder | InPlace


def settle(plan: Plan, settings: Settings) -> Choice:
    """Device and dtype, announced; and a memory budget that can hold at least one block."""
    if plan.memory > settings.max_memory:
        raise UsageError(
            f"--max-memory {format_size(settings.max_memory)} does not hold one block of the largest module.",
            hint=f"--max-memory {-(-plan.memory // 2**20)}MiB is the least",
        )
    choice = choose(settings.device, settings.compute_dtype)
    settings.notify(f"device: {choice}")
    return choice


@contextmanager
def entered(folder: Folder) -> Iterator[None]:
    """OUT.partial, locked. What is done there stays for the same command to continue, unless it would fail again."""
    folder.open()
    try:
        yield
    except NumericalError:
        folder.discard()
        raise
    except OSError as error:
        kept = (folder.record / JOURNAL).exists()
        folder.leave() if kept else folder.discard()
        raise OutputError(
            f"{folder.out} cannot be written: {error.strerror or error}.",
            hint=f"what is done stays in {folder.partial}; the same command continues it" if kept else None,
        ) from error
    except BaseException:
        folder.leave()
        raise


def run_key(plan: Plan, folder: Folder, hashes: Hashes, choice: Choice) -> Record:
    """Everything that decides the output's bytes."""
    return {
        "plan": plan.fingerprint,
        "adapters": [dict(found) for found in hashes],
        "base": [[str(folder.out.resolve())]] if isinstance(folder, InPlace) else _identity(plan.base),
        "versions": [__version__, torch.__version__],
        "device": choice.device.type,
        "compute": choice.compute_name,
    }


def _identity(base: Checkpoint) -> list[list[Any]]:
    """What tells a base from another with the same headers, without reading it."""
    if base.source.commit:
        return [[str(base.source.repo), base.source.commit]]
    found: list[list[Any]] = []
    for shard in base.shards:
        path = (base.root / shard.filename).resolve()
        stat = path.stat()
        found.append([str(path), stat.st_size, stat.st_mtime_ns])
    return found


def earlier(folder: Folder, plan: Plan, key: Record) -> Earlier | None:
    """The journal of an unfinished run of the same key; OUT.partial is then ready to go on, else empty."""
    earlier = read_journal(folder.record / JOURNAL)
    if earlier and earlier.key == key and folder.resumable(plan):
        folder.clear(keep=[RECORD, *(shard.filename for shard in plan.shards)])
        return earlier
    if earlier and earlier.key != key and not folder.overwrite:
        raise OutputError(
            f"{folder.partial} holds an unfinished merge of something else.", hint=folder.WAY_OUT
        )
    folder.clear()
    return None


def run(
    plan: Plan, folder: Folder, settings: Settings, choice: Choice, key: Record, earlier: Earlier | None
) -> Run:
    """Make every tensor that is not made yet; when this returns, all bytes and the journal are synced."""
    place = folder if isinstance(folder, InPlace) else None
    progress = Progress.of(earlier.records if earlier else ())
    with ExitStack() as stack:
        reader = stack.enter_context(closing(Reader()))
        spool = stack.enter_context(closing(Spool(folder.record / undo.SPOOL, progress.spooled)))
        shards = stack.enter_context(closing(_shards(folder, plan, new=earlier is None)))
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
            choice,
            budget,
            checker,
            settings.on_progress,
            progress,
            place,
        )
        running.execute(settings.workers)
    return running


def _shards(folder: Folder, plan: Plan, *, new: bool) -> ShardFiles:
    if isinstance(folder, InPlace):
        return ShardFiles(folder.partial, plan, create=False, places=folder.places)
    return ShardFiles(folder.partial, plan, create=new)


def judge(plan: Plan, done: Mapping[str, Done]) -> Verdict:
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
