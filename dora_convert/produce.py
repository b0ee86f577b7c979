"""Carry a plan out: look at values, fill OUT.partial or continue it, check what was written, publish it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch

from . import __version__, receipt, undo
from .arrivals import absent
from .checkpoint import RECORD, Checkpoint
from .checks import doubt_base, scan_adapter
from .errors import Fault, NumericalError, OutputError, UsageError, VerificationError
from .execute import Budget, Done, Progress, Run
from .folder import OutputFolder
from .journal import NAME as JOURNAL
from .journal import Earlier, Journal, Record, read_journal
from .plan import Plan
from .precision import Choice, choose
from .report import MergeReport
from .selfcheck import Checker, Verdict
from .settings import Settings
from .sidefiles import SideFile, card_of, side_files, with_checks
from .sizes import format_size
from .stored import Reader
from .traffic import Traffic
from .undo import Part, Spool
from .writer import ShardFiles, shards_exist

Hashes = Sequence[Mapping[str, str]]


def produce(plan: Plan, folder: OutputFolder, settings: Settings, hub: Traffic | None = None) -> MergeReport:
    """Run a merge's plan and publish the result, on the Hub, too, where `hub` has an upload.

    Raises UsageError for a device or a memory budget that will not do, NumericalError for NaN, Inf and overflow,
    OutputError for a disk that does not take the result, VerificationError when the self-check fails. OUT does not
    exist then.
    """
    choice = _settle(plan, settings)
    hashes = [scan_adapter(adapter) for adapter in plan.adapters]
    seen = _look_at_base(plan, settings)
    files = side_files(plan, settings.base_model)
    kept = hub.most(plan) if hub else plan.bytes_out
    folder.check_space(kept + 2 * plan.undo_bytes + sum(file.nbytes for file in files))
    with _entered(folder):
        key = _key(plan, hashes, choice)
        earlier = _earlier(folder, plan, key)
        if hub:
            hub.enter(folder.partial)
        run = _run(plan, folder, settings, choice, key, earlier, hub)
        if not seen:
            _look_at_base(plan, settings)
        verdict = _judge(plan, run.progress.done) if settings.verify else None
        if _same(plan, run.progress.done):
            settings.warn("the adapter changes nothing: every element is as it was in the base")
        if verdict:
            files = with_checks(files, plan, settings.base_model, verdict.rows())
        _write_files(plan, folder, run, files, hashes)
        pushed = hub.finish(card_of(files, plan), f"Merge with dora-convert {__version__}") if hub else None
        folder.publish() if not hub or hub.local else folder.discard()
    return MergeReport.of(
        plan,
        settings,
        pushed.url if pushed and hub and not hub.local else folder.given,
        choice,
        verdict,
        written=run.written,
        resumed=bool(earlier and earlier.records),
        pushed=pushed,
    )


def _look_at_base(plan: Plan, settings: Settings) -> bool:
    """Warn where the base does not look like the adapter's; False where its weights are not here."""
    if absent(plan.base):
        return False
    if doubt := doubt_base(plan):
        settings.warn(doubt)
    return True


def _settle(plan: Plan, settings: Settings) -> Choice:
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
def _entered(folder: OutputFolder) -> Iterator[None]:
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


def _key(plan: Plan, hashes: Hashes, choice: Choice) -> Record:
    """Everything that decides the output's bytes."""
    return {
        "plan": plan.fingerprint,
        "adapters": [dict(found) for found in hashes],
        "base": _identity(plan.base),
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


def _earlier(folder: OutputFolder, plan: Plan, key: Record) -> Earlier | None:
    """The journal of an unfinished run of the same key; OUT.partial is then ready to go on, else empty."""
    earlier = read_journal(folder.record / JOURNAL)
    if earlier and earlier.key == key and shards_exist(folder.partial, plan):
        folder.clear(keep=[RECORD, *(shard.filename for shard in plan.shards)])
        return earlier
    if earlier and earlier.key != key and not folder.overwrite:
        raise OutputError(
            f"{folder.partial} holds an unfinished merge of something else.",
            hint="--overwrite starts over; what is there is lost",
        )
    folder.clear()
    return None


def _run(
    plan: Plan,
    folder: OutputFolder,
    settings: Settings,
    choice: Choice,
    key: Record,
    earlier: Earlier | None,
    hub: Traffic | None,
) -> Run:
    """Make every tensor that is not made yet; when this returns, all bytes and the journal are synced."""
    progress = Progress.of(earlier.records if earlier else ())
    with ExitStack() as stack:
        reader = stack.enter_context(closing(hub.reader() if hub else Reader()))
        spool = stack.enter_context(closing(Spool(folder.record / undo.SPOOL, progress.spooled)))
        sparse = bool(hub and not hub.local)
        files = ShardFiles(folder.partial, plan, create=earlier is None, sparse=sparse)
        shards = stack.enter_context(closing(files))
        if hub:
            hub.attach(shards)
        folder.sync()
        journal = stack.enter_context(closing(Journal(folder.record / JOURNAL, key, earlier)))
        checker = Checker(folder.partial, plan, reader) if settings.verify else None
        budget = Budget(settings.max_memory)
        run = Run(
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
            hub.made if hub else None,
            hub.stop if hub else None,
        )
        run.execute(settings.workers)
        if hub:
            hub.settle()
    return run


def _judge(plan: Plan, done: Mapping[str, Done]) -> Verdict:
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


def _same(plan: Plan, done: Mapping[str, Done]) -> bool:
    """Whether every tensor that adapters had a part in holds the base's bytes."""
    return all(
        item.dtype == item.base.dtype and done[item.name].base_hash == done[item.name].written_hash
        if item.base and item.name in done and not item.added
        else False
        for item in plan.items
        if item.changed
    )


def _write_files(
    plan: Plan, folder: OutputFolder, run: Run, files: Sequence[SideFile], hashes: Hashes
) -> None:
    """Everything beside the weights: side files, the undo record, the receipt."""
    for file in files:
        folder.put(file.name, file.source)
    with closing(Spool(folder.record / undo.SPOOL, run.progress.spooled)) as spool:
        if plan.options.undo != "none":
            made = [
                part
                for item in plan.items
                if item.changed and not item.verbatim
                for part in run.progress.done[item.name].parts
            ]
            spool.lay_out([*made, *_originals(files, spool)], folder.record / undo.NAME)
    folder.put(
        f"{RECORD}/{receipt.NAME}", receipt.receipt_bytes(plan, run.progress.done, hashes, files, run.choice)
    )


def _originals(files: Sequence[SideFile], spool: Spool) -> list[Part]:
    """The base's side files that OUT does not hold as they were, as parts of the undo record."""
    parts = []
    for file in files:
        if file.original:
            data = file.original.read_bytes()
            parts.append(Part(f"file/{file.name}", "U8", (len(data),), (spool.add(data),)))
    return parts
