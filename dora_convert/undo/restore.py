"""Run an unmerge: compare MERGED with the receipt, recover the base, prove it by hashes, publish it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import xxhash

from ..engine.preflight import scan_adapter
from ..engine.run import RunOptions, Transfers, choose_compute, entered, input_states, judge, resume_plan, run, run_key
from ..errors import Fault, RefError, VerificationError
from ..output.finished import TensorResult, copied_name
from ..output.side_files import SideFile
from ..plan.item import Item
from ..reports.merge import MergeReport, Recovered, UnmergeReport
from ..settings import Settings
from ..storage.changes import refuse_changed
from ..storage.reader import Digest, Reader
from .expected_base import RecoveryCheck
from .files import left_over
from .record import not_as_written
from .recover import RecoveryMaker
from .unmerge_plan import Known, UnmergePlan

if TYPE_CHECKING:
    from ..output.output import Output

Proofs = Mapping[str, Digest]


def restore(
    reversal: UnmergePlan,
    files: Sequence[SideFile],
    output: Output,
    settings: Settings,
    hub: Transfers | None = None,
    later: Callable[[Mapping[str, TensorResult]], Sequence[SideFile]] = lambda _: (),
) -> UnmergeReport:
    """Run a plan that undoes a merge, and publish the base.

    `hub` downloads the inputs; `later` makes further side files from the results.

    Raises RefError if MERGED is not as a merge wrote it, VerificationError if a tensor differs from the
    base's though the record is exact, and every error of a merge. OUT does not exist then.
    """
    plan, record = reversal.plan, reversal.record
    spec = choose_compute(plan.memory, settings)
    hashes = [scan_adapter(adapter) for adapter in plan.adapters]
    output.check_space(output.bytes_needed(plan) + sum(file.nbytes for file in files))
    copied = _copied(reversal, hub)
    inputs = input_states(output, filter(None, [plan.base, reversal.original]), plan.adapters)
    with entered(output, *inputs):
        key = run_key(plan, output, hashes, spec) | {"receipt": xxhash.xxh3_128_hexdigest(record.receipt.to_bytes())}
        unfinished = resume_plan(output, plan, key)
        if output.in_place and not unfinished:
            from ..engine.rehearsal import rehearse

            _prove(reversal, rehearse(plan, settings, spec, RecoveryMaker), copied)
        options = RunOptions(
            spec=spec,
            key=key,
            unfinished=unfinished,
            maker=RecoveryMaker,
            check=RecoveryCheck if settings.verify else None,
            hub=hub,
            hashed=() if output.in_place else {item.name for item in _untouched(reversal)},
        )
        finished = run(plan, output, settings, options)
        verdict = judge(plan, finished.progress.done) if settings.verify else None
        modules = _prove_or_discard(reversal, finished.progress.done, copied, output)
        for file in (*files, *later(finished.progress.done)):
            output.put(file.name, file.source)
        resumed = bool(unfinished and unfinished.lines)
        report = MergeReport.of(
            plan, settings, out=output.given, spec=spec, verdict=verdict, written=finished.written, resumed=resumed
        )
        report = UnmergeReport.of_run(report, base=record.receipt.base.title, undo=record.options.undo, modules=modules)
        refuse_changed(*inputs)
        output.publish(report.to_dict(), left_over(plan.base, record, files))
    return report


def _copied(reversal: UnmergePlan, hub: Transfers | None) -> Proofs:
    """Return the hashes of tensors that are copied though a merge changed them.

    Raises RefError if a tensor that is not read differs from the receipt's.
    """
    faults, digests = [], {}
    tensors = reversal.record.receipt.tensors
    with closing(hub.reader() if hub else Reader()) as reader:
        for name, stored in reversal.unread.items():
            if reader.digest(stored).fast != tensors[name].written:
                faults.append(name)
        for item in reversal.plan.items:
            if item.verbatim and (known := reversal.known.get(item.name)):
                digests[item.name] = reader.digest(item.source, proof=bool(known.proof))
    _refuse_changed(faults, reversal)
    return digests


def _untouched(reversal: UnmergePlan) -> Iterator[Item]:
    """Yield the tensors that no adapter touched and whose hash the receipt holds."""
    noted = reversal.record.receipt.copied
    return (item for item in reversal.plan.items if item.verbatim and item.source.name in noted)


def _altered(reversal: UnmergePlan, done: Mapping[str, TensorResult]) -> list[str]:
    """Return the tensors that no adapter touched and whose hash differs from the receipt's."""
    noted = reversal.record.receipt.copied
    results = {item.source.name: done.get(copied_name(item)) for item in _untouched(reversal)}
    return [name for name, result in results.items() if result and result.base_hash != noted[name]]


def _refuse_changed(names: Sequence[str], reversal: UnmergePlan) -> None:
    if names:
        raise not_as_written(reversal.plan.base, [Fault(name, "was changed since") for name in names])


def _prove_or_discard(
    reversal: UnmergePlan, done: Mapping[str, TensorResult], copied: Proofs, output: Output
) -> list[Recovered]:
    """Compare all hashes with the receipt's; discard the output, which cannot be resumed, if one differs."""
    try:
        _refuse_changed(_altered(reversal, done), reversal)
        return _prove(reversal, done, copied)
    except (RefError, VerificationError):
        output.discard()
        raise


def _prove(reversal: UnmergePlan, done: Mapping[str, TensorResult], copied: Proofs) -> list[Recovered]:
    """Compare the hashes of MERGED's and of the recovered tensors with the receipt's."""
    undone = [item.name for item in reversal.plan.items if item.undo]
    changed = [name for name in undone if _differs(_known(reversal, name).written, done[name].base_hash)]
    _refuse_changed(changed, reversal)
    modules = list(_recovered(reversal, done, copied))
    if wrong := [module.name for module in modules if not module.bit_exact and _promised(reversal, module)]:
        raise VerificationError(
            f"{len(wrong)} tensors differ from the base's, though the record should be exact.",
            faults=[Fault(name, "has another sha256") for name in wrong],
            hint="the undo record or the disk may be damaged",
        )
    return modules


def _promised(reversal: UnmergePlan, module: Recovered) -> bool:
    """Return True if a tensor must equal the base's: the merge left its sha256 and a whole undo record."""
    return _known(reversal, module.name).proof is not None and not reversal.record.torn


def _known(reversal: UnmergePlan, name: str) -> Known:
    return reversal.known.get(name, Known())


def _recovered(reversal: UnmergePlan, done: Mapping[str, TensorResult], copied: Proofs) -> Iterator[Recovered]:
    """Yield every tensor that the merge had changed, and the word if its hash is the base's."""
    for item in reversal.plan.items:
        known = _known(reversal, item.name)
        if item.undo and (result := done.get(item.name)):
            exact = _is_base(known, result.written_hash, result.proof)
            yield Recovered(item.name, exact, 0 if exact else result.ambiguous, item.source.numel)
        elif item.name in copied:
            digest = copied[item.name]
            exact = _is_base(known, digest.fast, digest.proof)
            lost = (reversal.record.receipt.rounded or {}).get(item.name, (None, 0))[1]
            yield Recovered(item.name, exact, 0 if exact else lost, item.source.numel)


def _is_base(known: Known, fast: str, proof: str | None) -> bool:
    """Return True if the hashes are the base's; the sha256 decides if it is known."""
    if not (known.base or known.proof):
        return False
    return proof == known.proof if known.proof else fast == known.base


def _differs(wanted: str | None, found: str | None) -> bool:
    """Return True if `wanted` is known and differs from `found`."""
    return wanted is not None and wanted != found
