"""Carry a plan out: look at values, fill OUT.partial or continue it, check what was written, publish it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing

from . import receipt, undo
from .checkpoint import RECORD
from .checks import doubt_base, scan_adapter
from .errors import Fault, VerificationError
from .execute import Budget, Done, Progress, Run
from .folder import OutputFolder
from .journal import NAME as JOURNAL
from .journal import Earlier, Journal, Record
from .plan import Plan
from .precision import Choice
from .report import MergeReport
from .selfcheck import Checker, Verdict
from .settings import Settings
from .sidefiles import SideFile, side_files
from .stored import Reader
from .undo import Part, Spool
from .workspace import earlier_run, entered, journal_key, settle
from .writer import ShardFiles, shards_exist

Hashes = Sequence[Mapping[str, str]]


def produce(plan: Plan, folder: OutputFolder, settings: Settings) -> MergeReport:
    """Run a merge's plan and publish the result.

    Raises UsageError for a device or a memory budget that will not do, NumericalError for NaN, Inf and overflow,
    OutputError for a disk that does not take the result, VerificationError when the self-check fails. OUT does not
    exist then.
    """
    choice = settle(plan.memory, settings)
    hashes = [scan_adapter(adapter) for adapter in plan.adapters]
    if doubt := doubt_base(plan):
        settings.warn(doubt)
    files = side_files(plan, settings.base_model)
    folder.check_space(plan.bytes_out + 2 * plan.undo_bytes + sum(file.nbytes for file in files))
    with entered(folder):
        key = _key(plan, hashes, choice)
        names = [shard.filename for shard in plan.shards]
        earlier = earlier_run(folder, key, names, lambda: shards_exist(folder.partial, plan))
        run = _run(plan, folder, settings, choice, key, earlier)
        verdict = _judge(plan, run.progress.done) if settings.verify else None
        if _same(plan, run.progress.done):
            settings.warn("the adapter changes nothing: every element is as it was in the base")
        _write_files(plan, folder, run, files, hashes)
        folder.publish()
    return MergeReport.of(
        plan,
        settings,
        folder.given,
        choice,
        verdict,
        written=run.written,
        resumed=bool(earlier and earlier.records),
    )


def _key(plan: Plan, hashes: Hashes, choice: Choice) -> Record:
    """Everything that decides the output's bytes."""
    adapters = [dict(found) for found in hashes]
    return journal_key(choice, [plan.base], plan=plan.fingerprint, adapters=adapters)


def _run(
    plan: Plan, folder: OutputFolder, settings: Settings, choice: Choice, key: Record, earlier: Earlier | None
) -> Run:
    """Make every tensor that is not made yet; when this returns, all bytes and the journal are synced."""
    progress = Progress.of(earlier.records if earlier else ())
    with ExitStack() as stack:
        reader = stack.enter_context(closing(Reader()))
        spool = stack.enter_context(closing(Spool(folder.record / undo.SPOOL, progress.spooled)))
        shards = stack.enter_context(closing(ShardFiles(folder.partial, plan, create=earlier is None)))
        folder.sync()
        journal = stack.enter_context(closing(Journal(folder.record / JOURNAL, key, earlier)))
        checker = Checker(folder.partial, plan, reader) if settings.verify else None
        budget = Budget(settings.max_memory)
        run = Run(
            plan, shards, reader, spool, journal, choice, budget, checker, settings.on_progress, progress
        )
        run.execute(settings.workers)
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
