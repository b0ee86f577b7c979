"""Carry an unmerging out: compare what is read with the receipt, recover the base, prove it, publish it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

import xxhash

from ..engine.preflight import scan_adapter
from ..engine.rehearsal import rehearse
from ..engine.resume import entered, settle
from ..engine.run import RunOptions, Transfers, earlier, judge, run, run_key
from ..errors import Fault, RefError, VerificationError
from ..output.finished import TensorResult, copied_name
from ..output.output import Output
from ..output.side_files import SideFile
from ..parity.self_check import Checker
from ..plan.item import Item
from ..reports.merge import MergeReport, Recovered, UnmergeReport
from ..settings import Settings
from ..storage.digests import Digest, stored_digest
from ..storage.reader import Reader
from .files import left_over
from .record import not_as_written
from .recover import Recovering
from .unmerge_plan import Known, UnmergePlan

Proofs = Mapping[str, Digest]


def restore(
    reversal: UnmergePlan,
    files: Sequence[SideFile],
    folder: Output,
    settings: Settings,
    hub: Transfers | None = None,
    later: Callable[[Mapping[str, TensorResult]], Sequence[SideFile]] = lambda _: (),
) -> UnmergeReport:
    """Run a plan that undoes a merge, and publish the base; `later` makes files of what is known of its tensors.

    `hub` brings what is to be read.

    Raises RefError where MERGED is not what was written, VerificationError where a tensor is not the base's though the
    record should give it back bit for bit, and what merging raises. OUT does not exist then.
    """
    plan = reversal.plan
    spec = settle(plan.memory, settings)
    hashes = [scan_adapter(adapter) for adapter in plan.adapters]
    folder.check_space(folder.room(plan) + sum(file.nbytes for file in files))
    copied = _copied(reversal, hub)
    with entered(folder):
        key = run_key(plan, folder, hashes, spec) | {
            "receipt": xxhash.xxh3_128_hexdigest(json.dumps(reversal.record.receipt).encode())
        }
        before = earlier(folder, plan, key)
        if folder.in_place and not before:
            _prove(reversal, rehearse(plan, settings, spec, Recovering), copied)
        hashed = () if folder.in_place else {item.name for item in _untouched(reversal)}
        options = RunOptions(Recovering, Checker if settings.verify else None, hub, hashed)
        done = run(plan, folder, settings, spec, (key, before), options)
        verdict = judge(plan, done.progress.done) if settings.verify else None
        with _discarding(folder):
            _refuse_changed(_altered(reversal, done.progress.done), reversal)
            modules = _prove(reversal, done.progress.done, copied)
        for file in (*files, *later(done.progress.done)):
            folder.put(file.name, file.source)
        resumed = bool(before and before.records)
        base, undo = reversal.record.receipt["base"], reversal.record.options.undo
        ended = MergeReport.of(
            plan,
            settings,
            out=folder.given,
            spec=spec,
            verdict=verdict,
            written=done.written,
            resumed=resumed,
        )
        report = UnmergeReport.of_run(ended, base=base["repo"] or base["name"], undo=undo, modules=modules)
        folder.publish(report.to_dict(), left_over(plan.base, reversal.record, files))
    return report


def _copied(reversal: UnmergePlan, hub: Transfers | None) -> Proofs:
    """Hashes of what is copied as bytes though a merge changed it; RefError where MERGED is not what was written."""
    faults, found = [], {}
    tensors = reversal.record.receipt["tensors"]
    with closing(hub.reader() if hub else Reader()) as reader:
        for name, stored in reversal.unread.items():
            if stored_digest(stored, reader).fast != tensors[name]["written"]:
                faults.append(name)
        for item in reversal.plan.items:
            if item.verbatim and (known := reversal.known.get(item.name)):
                found[item.name] = stored_digest(item.source, reader, proof=bool(known.proof))
    _refuse_changed(faults, reversal)
    return found


def _untouched(reversal: UnmergePlan) -> Iterator[Item]:
    """What no adapter touched, as far as the receipt has hashes of it."""
    noted = reversal.record.receipt.get("copied", {})
    return (item for item in reversal.plan.items if item.verbatim and item.source.name in noted)


def _altered(reversal: UnmergePlan, done: Mapping[str, TensorResult]) -> list[str]:
    """What no adapter touched and somebody else has."""
    noted = reversal.record.receipt.get("copied", {})
    found = {item.source.name: done.get(copied_name(item)) for item in _untouched(reversal)}
    return [name for name, made in found.items() if made and made.base_hash != noted[name]]


def _refuse_changed(names: Sequence[str], reversal: UnmergePlan) -> None:
    if names:
        raise not_as_written(reversal.plan.base, [Fault(name, "was changed since") for name in names])


@contextmanager
def _discarding(folder: Output) -> Iterator[None]:
    """Nothing is worth continuing where what was read, or what came of it, is not what it should be."""
    try:
        yield
    except (RefError, VerificationError):
        folder.discard()
        raise


def _prove(reversal: UnmergePlan, done: Mapping[str, TensorResult], copied: Proofs) -> list[Recovered]:
    """What was read and what came out of it, against the receipt."""
    undone = [item.name for item in reversal.plan.items if item.undo]
    changed = [name for name in undone if _other(_known(reversal, name).written, done[name].base_hash)]
    _refuse_changed(changed, reversal)
    modules = list(_recovered(reversal, done, copied))
    if wrong := [module.name for module in modules if not module.bit_exact and _promised(reversal, module)]:
        raise VerificationError(
            f"{len(wrong)} tensors are not the base's, though the record should give them back bit for bit.",
            faults=[Fault(name, "has another sha256") for name in wrong],
            hint="the undo record or the disk may be damaged",
        )
    return modules


def _promised(reversal: UnmergePlan, module: Recovered) -> bool:
    """Whether a tensor must be the base's: every one that the merge left a proof of, and all that gives it back."""
    return _known(reversal, module.name).proof is not None and not reversal.record.torn


def _known(reversal: UnmergePlan, name: str) -> Known:
    return reversal.known.get(name, Known())


def _recovered(
    reversal: UnmergePlan, done: Mapping[str, TensorResult], copied: Proofs
) -> Iterator[Recovered]:
    """Every tensor that the merge had changed, and whether it is the base's by hash."""
    for item in reversal.plan.items:
        known = _known(reversal, item.name)
        if item.undo and (made := done.get(item.name)):
            exact = _is_base(known, made.written_hash, made.proof)
            yield Recovered(item.name, exact, 0 if exact else made.ambiguous, item.source.numel)
        elif item.name in copied:
            digest = copied[item.name]
            exact = _is_base(known, digest.fast, digest.proof)
            lost = reversal.record.receipt.get("rounded", {}).get(item.name, [None, 0])[1]
            yield Recovered(item.name, exact, 0 if exact else lost, item.source.numel)


def _is_base(known: Known, fast: str, proof: str | None) -> bool:
    """Whether hashes are those of the base; sha256 counts where there is one."""
    if not (known.base or known.proof):
        return False
    return proof == known.proof if known.proof else fast == known.base


def _other(wanted: str | None, found: str | None) -> bool:
    """Whether a hash is known and another."""
    return wanted is not None and wanted != found
