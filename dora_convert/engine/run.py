"""Run a plan from its unfinished start, if there is one, to the verdict of the self-check."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .. import __version__
from ..adapters.adapter import Adapter
from ..errors import Fault, MalformedError, NumericalError, OutputError, RefError, VerificationError, hint_of
from ..output.finished import FinishedLine, Progress, TensorResult, Verdict
from ..output.shards import ShardFiles
from ..plan.plan import Plan
from ..settings import Settings
from ..storage.changes import FileStates, refuse_changed, same_lines
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import JOURNAL, RECORD, SPOOL, is_weight_file
from ..storage.journal import Journal, JournalKey, UnfinishedRun, read_journal
from ..storage.reader import Reader
from ..storage.spool import Spool
from .executor import Checker, Run
from .precision import ComputeSpec, choose
from .tensor import StartMaker

if TYPE_CHECKING:
    from ..output.output import Output

Hashes = Sequence[Mapping[str, str]]


class Transfers(Protocol):
    """The downloads of a plan's inputs and the uploads of its output, while the plan runs."""

    local: bool
    """True if the output stays on this machine."""

    def reader(self) -> Reader:
        """Return a reader that waits for files that are downloaded."""

    def attach(self, files: ShardFiles) -> None:
        """Take the open shards of the output."""

    def shard_finished(self, shard: str) -> None:
        """Note that a shard is finished and, if checked, right; called by workers."""

    def settle(self) -> None:
        """Wait until all finished shards are uploaded."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """A verb's part in the run of a plan."""

    spec: ComputeSpec
    key: JournalKey
    """Everything that decides the output's bytes; the journal's first line."""
    unfinished: UnfinishedRun | None
    """The run that is resumed."""
    maker: StartMaker
    check: Callable[[Path, Plan, Reader], Checker] | None = None
    """Starts the check of a written folder; None for no check."""
    hub: Transfers | None = None
    hashed: Collection[str] = ()
    """Names of copied tensors whose hashes are wanted."""


def choose_compute(least: int, settings: Settings) -> ComputeSpec:
    """Choose device and dtype, and notify the caller.

    Raises UsageError if the memory budget is below `least`, the costliest piece of work.
    """
    settings.check_memory(least)
    spec = choose(settings.device, settings.compute_dtype)
    settings.notify(f"device: {spec}")
    return spec


@contextmanager
def entered(output: Output, *inputs: FileStates) -> Iterator[None]:
    """Open and lock an output; after an error keep it if the same command can resume the run.

    An error over `inputs` that have changed meanwhile is the error that they have changed.
    """
    output.open()
    try:
        try:
            yield
        except (MalformedError, RefError, VerificationError):
            refuse_changed(*inputs)
            raise
    except RefError:  # an input has changed: what is written is a mixture
        output.leave() if output.in_place else output.discard()
        raise
    except NumericalError:
        output.discard()
        raise
    except OSError as error:
        kept = (output.state / JOURNAL).exists()
        output.leave() if kept else output.discard()
        raise OutputError(
            f"{output.out} cannot be written: {error.strerror or error}.",
            hint=hint_of(error) or (f"{output.partial} stays; rerun the same command to resume" if kept else None),
        ) from error
    except BaseException:
        output.leave()
        raise


def journal_key(spec: ComputeSpec, identity: Mapping[str, Any], **inputs: Any) -> JournalKey:
    """Return everything that decides the output's bytes: `identity`, `inputs`, versions and the device."""
    key = {
        **inputs,
        **identity,
        "versions": [__version__, torch.__version__],
        "device": spec.device.type,
        "compute": spec.compute_name,
    }
    as_read_back: JournalKey = json.loads(json.dumps(key))
    return as_read_back


def resume(
    output: Output, key: JournalKey, keep: list[str], complete: Callable[[], bool], line_type: type
) -> UnfinishedRun | None:
    """Return the journal of an unfinished run with the same key, or None and an empty output.

    `keep` names the files that the run goes on with, `complete` says that all of them exist, and `line_type`
    is the type of the journal's lines.
    """
    path = output.state / JOURNAL
    unfinished = read_journal(path)
    if unfinished and _same_key(unfinished.key, key) and complete():
        output.clear(keep=[RECORD, *keep])
        return read_journal(path, line_type)
    if unfinished and not _same_key(unfinished.key, key) and not output.overwrite:
        raise OutputError(f"{output.partial} holds an unfinished run of something else.", hint=output.WAY_OUT)
    output.clear()
    return None


def _same_key(earlier: JournalKey, key: JournalKey) -> bool:
    return {**earlier, "base": None} == {**key, "base": None} and same_lines(earlier.get("base"), key["base"])


def input_states(output: Output, checkpoints: Iterable[Checkpoint], adapters: Iterable[Adapter]) -> list[FileStates]:
    """Return the files that a run reads, to be compared before it publishes; in place, its own weights change."""
    read = [each.states for each in checkpoints]
    if output.in_place:
        read = [{path: state for path, state in read[0].items() if not is_weight_file(path.name)}, *read[1:]]
    return [*read, *(adapter.states for adapter in adapters)]


def run_key(plan: Plan, output: Output, hashes: Hashes, spec: ComputeSpec) -> JournalKey:
    """Return everything that decides the bytes of a plan's output."""
    adapters = [dict(files) for files in hashes]
    return journal_key(spec, output.identity([plan.base]), plan=plan.fingerprint, adapters=adapters)


def resume_plan(output: Output, plan: Plan, key: JournalKey) -> UnfinishedRun | None:
    """Return the journal of an unfinished run of the same plan, or None and an empty output."""
    names = [shard.filename for shard in plan.shards]
    return resume(output, key, names, lambda: output.resumable(plan), FinishedLine)


def run(plan: Plan, output: Output, settings: Settings, options: RunOptions) -> Run:
    """Write every tensor that is not finished yet; all bytes and the journal are synced afterwards."""
    hub, unfinished = options.hub, options.unfinished
    progress = Progress.of(unfinished.lines if unfinished else ())
    with ExitStack() as stack:
        reader = stack.enter_context(closing(hub.reader() if hub else Reader()))
        spool = stack.enter_context(closing(Spool(output.state / SPOOL, progress.spooled)))
        sparse = hub is not None and not hub.local
        shards = stack.enter_context(closing(output.open_shards(plan, new=unfinished is None, sparse=sparse)))
        if hub:
            hub.attach(shards)
        output.sync()
        execution = Run(
            plan=plan,
            settings=settings,
            spec=options.spec,
            shards=shards,
            reader=reader,
            spool=spool,
            journal=stack.enter_context(closing(Journal(output.state / JOURNAL, options.key, unfinished))),
            maker=options.maker,
            checker=options.check(output.partial, plan, reader) if options.check else None,
            progress=progress,
            on_shard=hub.shard_finished if hub else None,
            output=output,
            hashed=options.hashed,
        )
        execution.execute()
        if hub:
            hub.settle()
    return execution


def judge(plan: Plan, done: Mapping[str, TensorResult]) -> Verdict:
    """Return the sum of all verdicts; raise VerificationError, naming every tensor that is wrong."""
    total, faults = Verdict(), []
    for item in plan.items:
        if item.name in done and (verdict := done[item.name].verdict):
            total += verdict
            if verdict.wrong:
                why = f"{verdict.wrong} of {verdict.checked} elements, up to {verdict.max_ulp} ulp"
                faults.append(Fault(item.name, why))
    if faults:
        raise VerificationError(
            f"The self-check failed: {len(faults)} tensors on disk are not what was computed.",
            faults=faults,
            hint="the disk or the memory may be faulty; rerun the same command to write these tensors again",
        )
    return total
