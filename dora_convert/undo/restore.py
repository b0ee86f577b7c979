"""Run an unmerge: compare MERGED with the receipt, recover the base, prove it by hashes, publish it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import xxhash

from ..engine.precision import ComputeSpec, scan_adapter
from ..engine.run import Executor, Hashes, Run, choose_compute, resume_plan, run
from ..errors import Fault, MalformedError, RefError, VerificationError
from ..output.finished import TensorResult, copied_name, judge
from ..output.output import input_states
from ..output.side_files import SideFile
from ..reports.merge import Recovered, UnmergeReport
from ..settings import Settings
from ..storage.filenames import RECORD, UNDO, refuse_changed
from ..storage.reader import Digest, Reader
from ..storage.spool import damaged_tensors
from .expected_base import RecoveryCheck
from .files import left_over
from .record import not_as_written
from .recover import RecoveryMaker
from .unmerge_plan import UnmergePlan

if TYPE_CHECKING:
    from ..output.output import Output, Transfers

Proofs = Mapping[str, Digest]


def restore(
    reversal: UnmergePlan,
    files: Sequence[SideFile],
    output: Output,
    settings: Settings,
    hub: Transfers | None = None,
    later: Callable[[Mapping[str, TensorResult]], Sequence[SideFile]] = lambda _: (),
    executor: Executor | None = None,
) -> UnmergeReport:
    """Run a plan that undoes a merge, and publish the base.

    `hub` downloads the inputs; `later` makes further side files from the results. `executor` writes the tensors;
    None for threads of this process.

    Raises RefError if MERGED is not as a merge wrote it, VerificationError if a tensor differs from the
    base's though the record is exact, and every error of a merge. OUT does not exist then.
    """
    spec = choose_compute(reversal.plan.memory, settings, executor)
    if spec.staged:
        from ..engine.device_plan import cut_for

        reversal = replace(reversal, plan=cut_for(reversal.plan, spec, settings))
    plan = reversal.plan
    hashes = [scan_adapter(adapter) for adapter in plan.adapters]
    output.check_space(output.bytes_needed(plan) + sum(file.nbytes for file in files))
    copied = _copied(reversal, hub)
    inputs = input_states(output, filter(None, [plan.base, reversal.original]), plan.adapters)
    with output.entered(*inputs):
        finished = _recover(reversal, output, settings, hub, spec=spec, hashes=hashes, copied=copied, executor=executor)
        done = finished.progress.done
        verdict = judge(plan, done) if settings.verify else None
        try:
            modules = _prove(reversal, done, copied)
        except (RefError, VerificationError):  # the output cannot be resumed
            output.discard()
            raise
        for file in (*files, *later(done)):
            output.put(file.name, file.source)
        fields = _fields(reversal, modules)
        report = UnmergeReport.of(plan, settings, finished, out=output.given, verdict=verdict, **fields)
        refuse_changed(*inputs)
        output.publish(report.to_dict, left_over(plan.base, reversal.record, files))
    return report


def _recover(
    reversal: UnmergePlan,
    output: Output,
    settings: Settings,
    hub: Transfers | None,
    *,
    spec: ComputeSpec,
    hashes: Hashes,
    copied: Proofs,
    executor: Executor | None,
) -> Run:
    """Write every tensor of the base, from the start or from an unfinished run."""
    receipt = xxhash.xxh3_128_hexdigest(reversal.record.receipt.to_bytes())
    key, unfinished = resume_plan(output, reversal.plan, hashes, spec, receipt=receipt)
    if output.in_place and not unfinished:
        from ..engine.rehearsal import rehearse

        results = rehearse(reversal.plan, settings, spec, RecoveryMaker, reversal.copies())
        _prove(reversal, results, copied)
    return run(
        reversal.plan,
        output,
        settings,
        key=key,
        unfinished=unfinished,
        check=partial(RecoveryCheck, memory=settings.memory_each) if settings.verify else None,
        hub=hub,
        spec=spec,
        maker=RecoveryMaker,
        executor=executor,
        hashed=() if output.in_place else reversal.copies(),
    )


def _fields(reversal: UnmergePlan, modules: Sequence[Recovered]) -> dict[str, Any]:
    """Return the fields of the report that a merge's report lacks or fills otherwise."""
    return {
        "command": "unmerge",
        "base": reversal.record.receipt.base.title,
        "merged": reversal.plan.base.source.address,
        "undo": reversal.record.options.undo,
        "exact": {"tensors": len(modules), "bit_exact": sum(module.bit_exact for module in modules)},
        "modules": tuple(modules),
    }


def _copied(reversal: UnmergePlan, hub: Transfers | None) -> Proofs:
    """Return the hashes of tensors that are copied though a merge changed them.

    Raises RefError if a tensor that is not read differs from the receipt's, MalformedError if one of the
    undo record does.
    """
    faults, digests = [], {}
    receipt = reversal.record.receipt
    tensors = receipt.tensors
    with closing(hub.reader() if hub else Reader()) as reader:
        record = reversal.record
        if damaged := [] if record.torn else damaged_tensors(receipt.undo_record, record.tensors, reader):
            raise MalformedError(
                f"{RECORD}/{UNDO} of {reversal.plan.base.source.name} is damaged: {damaged[0].what} {damaged[0].why}.",
                faults=damaged,
                hint="merge again; or remove the file, and name the base with --base",
            )
        for name, stored in reversal.unread.items():
            if reader.digest(stored).fast != tensors[name].written:
                faults.append(name)
        for item in reversal.plan.items:
            if item.verbatim and (known := reversal.known.get(item.name)):
                digests[item.name] = reader.digest(item.source, proof=bool(known.proof))
    _refuse_changed(faults, reversal)
    return digests


def _refuse_changed(names: Sequence[str], reversal: UnmergePlan) -> None:
    if names:
        raise not_as_written(reversal.plan.base, [Fault(name, "was changed since") for name in names])


def _prove(reversal: UnmergePlan, done: Mapping[str, TensorResult], copied: Proofs) -> list[Recovered]:
    """Compare the hashes of MERGED's and of the recovered tensors with the receipt's."""
    changed = []
    for item in reversal.plan.items:
        if item.undo and reversal.hashes(item.name).written not in (None, done[item.name].base_hash):
            changed.append(item.name)
        if (result := done.get(copied_name(item))) and result.base_hash != reversal.untouched[item.source.name]:
            changed.append(item.source.name)
    _refuse_changed(changed, reversal)
    modules = list(_recovered(reversal, done, copied))
    promised = {module.name for module in modules if reversal.hashes(module.name).proof and not reversal.record.torn}
    if wrong := [module.name for module in modules if not module.bit_exact and module.name in promised]:
        raise VerificationError(
            f"{len(wrong)} tensors differ from the base's, though the record should be exact.",
            faults=[Fault(name, "has another sha256") for name in wrong],
            hint="the undo record or the disk may be damaged",
        )
    return modules


def _recovered(reversal: UnmergePlan, done: Mapping[str, TensorResult], copied: Proofs) -> Iterator[Recovered]:
    """Yield every tensor that the merge had changed, and the word if its hash is the base's."""
    rounded = reversal.record.receipt.rounded or {}
    for item in reversal.plan.items:
        known = reversal.hashes(item.name)
        if item.undo and (result := done.get(item.name)):
            exact, lost = known.are_of(result.written_hash, result.proof), result.ambiguous
        elif digest := copied.get(item.name):
            exact, lost = known.are_of(digest.fast, digest.proof), rounded.get(item.name, (None, 0))[1]
        else:
            continue
        yield Recovered(item.name, exact, 0 if exact else lost, item.source.numel)
