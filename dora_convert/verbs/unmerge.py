"""unmerge: take adapters out of a merged checkpoint again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..adapter import Adapter, open_adapter
from ..checkpoint import open_checkpoint
from ..digests import xxh3
from ..folder import OutputFolder
from ..heavy import without_collections
from ..hub import fetch, wanted_of_adapter, wanted_of_base
from ..record import Record, in_order, read_record
from ..refs import PathLike, listed
from ..report import DryRunReport, UnmergeReport
from ..settings import Settings, parse_options
from ..sidefiles import restored_files
from ..unmerging import plan_unmerge


def unmerge(
    merged: PathLike,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    device: str = "auto",
    compute_dtype: str = "auto",
    max_shard_size: str | int | None = None,
    max_memory: str | int = "160MiB",
    workers: int | None = None,
    verify: bool = True,
    token: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> UnmergeReport | DryRunReport:
    """Take adapters out of what `merge` made of a base: bit for bit where its undo record is exact, else up to rounding.

    `adapters` are the very ones that were merged. The report's `exact` says how many tensors are proven to be the
    base's by their hashes.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    options = parse_options("auto", compute_dtype, max_shard_size, "none", (), (), True, ())
    settings = Settings.parse(
        device, compute_dtype, max_memory, workers, verify, None, on_progress, on_notice, token
    )
    folder = OutputFolder(Path(out), overwrite=overwrite)
    folder.check()
    checkpoint = open_checkpoint(fetch(os.fspath(merged), "MERGED", wanted_of_base, token=token))
    record = read_record(checkpoint)
    assert record
    opened = _adapters(listed(adapters), record, settings)
    folder.refuse_inside([checkpoint.source.path, *(adapter.source.path for adapter in opened)])
    reversal = plan_unmerge(checkpoint, record, opened, options)
    files = restored_files(checkpoint, record, reversal.plan)
    if dry_run:
        return DryRunReport.of(reversal.plan, settings, folder.given, "unmerge")
    with without_collections():
        from ..restoring import restore
    return restore(reversal, files, folder, settings)


def _adapters(refs: Sequence[str], record: Record, settings: Settings) -> list[Adapter]:
    """The adapters, which must be those that were merged, in the order of the merge."""
    accepted = record.options.ignore_field
    opened = [
        open_adapter(fetch(ref, "ADAPTER", wanted_of_adapter, token=settings.token), accepted) for ref in refs
    ]
    hashes = [{path.name: xxh3(path) for path in adapter.files} for adapter in opened]
    return in_order(record, opened, hashes)[0]
