"""Restore the base's side files, and list the files that a merge brought and its base did not have."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ..errors import Fault
from ..output.side_files import PREVIOUS, SideFile, base_files
from ..plan.plan import Plan
from ..plan.sharding import index_bytes
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import INDEX_SUFFIX, RECORD, list_files
from ..storage.reader import sha256
from .record import MergeRecord, not_as_written


def restored_files(merged: Checkpoint, record: MergeRecord, plan: Plan, original: Checkpoint | None) -> list[SideFile]:
    """Return the base's side files, from the record, from MERGED, or from `original`, the base itself.

    Side files that a merge without an undo record has replaced are left out. The record of the merge before,
    if any, is a side file. Raises RefError if a file has changed since.
    """
    found, faults = [], []
    own = base_files(original) if original else {}
    for name, proof in record.receipt.base_files.items():
        data, path = record.file(name), own.get(name, merged.root / name)
        gone = record.options.undo == "none" and record.receipt.side_files.get(name) != "copied"
        if name.endswith(INDEX_SUFFIX) and (gone or plan.options.max_shard_size is not None):
            continue
        if data is not None or path.is_file():
            source = path if data is None else data
            if proof and proof != (sha256(path) if data is None else hashlib.sha256(data).hexdigest()):
                why = "was changed since" if data is None else "is damaged in the undo record"
                faults += [] if gone and not own else [Fault(name, why)]
                continue
            found.append(SideFile(name, source, "copied" if data is None else "restored"))
        elif not gone:
            faults.append(Fault(name, "is missing"))
    if faults:
        raise not_as_written(merged, faults)
    if plan.index_name and plan.index_name not in {file.name for file in found}:
        found.append(SideFile(plan.index_name, index_bytes(plan), "written"))
    before = merged.root / RECORD / PREVIOUS
    earlier = list_files(before) if before.is_dir() else []
    return [*found, *(SideFile(f"{RECORD}/{name}", before / name, "restored") for name in earlier)]


def remaining_files(merged: Checkpoint) -> list[SideFile]:
    """Return the side files without the card and the record, which name the removed adapter."""
    names = [name for name in base_files(merged) if name != "README.md"]
    before = [name for name in list_files(merged.root) if name.startswith(f"{RECORD}/{PREVIOUS}/")]
    return [SideFile(name, merged.root / name) for name in [*names, *before]]


def left_over(merged: Checkpoint, record: MergeRecord, files: Sequence[SideFile]) -> list[str]:
    """Return the side files that a merge brought and its base did not have."""
    ours = {name for name in list_files(merged.root) if name.startswith(f"{RECORD}/")}
    brought = {name for name in record.receipt.side_files if (merged.root / name).is_file()}
    return sorted((ours | brought) - {file.name for file in files})
