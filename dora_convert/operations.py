"""The verbs: what the command line and Python callers run. Each gathers, plans, checks, runs and reports."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import UsageError
from .folder import OutputFolder
from .gather import doubts, gather
from .plan import Options
from .planner import make_plan
from .report import DryRunReport, MergeReport
from .settings import COMPUTE_DTYPES, DTYPES, UNDO, Settings, chosen, default_workers
from .sizes import parse_size

PathLike = str | os.PathLike[str]


def merge(
    base: PathLike | None,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    weight: Sequence[float] = (),
    device: str = "auto",
    dtype: str = "auto",
    compute_dtype: str = "auto",
    max_shard_size: str | int | None = None,
    max_memory: str | int = "160MiB",
    workers: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    undo: str = "norms",
    allow_unmatched: bool = False,
    verify: bool = True,
    base_model: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> MergeReport | DryRunReport:
    """Fold adapters into a base checkpoint: W' = W + Σ wᵢ·(applyᵢ(W) − W), each element rounded once.

    `base` and each of `adapters` is a folder or a Hub repo (`org/name[@revision]`); a base of None is the one that the
    first adapter names. `out` must not exist unless `overwrite` is set. `on_progress` is called with bytes done and
    bytes in all, from worker threads; `on_notice` with each warning and choice as it comes up.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    started = time.monotonic()
    refs = [os.fspath(ref) for ref in ([adapters] if isinstance(adapters, (str, os.PathLike)) else adapters)]
    options = Options(
        dtype=chosen(dtype, DTYPES, "--dtype"),
        compute_dtype=chosen(compute_dtype, COMPUTE_DTYPES, "--compute-dtype"),
        max_shard_size=parse_size(max_shard_size, "--max-shard-size") if max_shard_size else None,
        undo=chosen(undo, UNDO, "--undo"),
        include=tuple(include),
        exclude=tuple(exclude),
        allow_unmatched=allow_unmatched,
    )
    settings = Settings(
        device=device,
        compute_dtype=compute_dtype,
        max_memory=parse_size(max_memory, "--max-memory"),
        workers=workers or default_workers(),
        verify=verify,
        base_model=base_model,
        on_progress=on_progress,
        on_notice=on_notice,
        started=started,
    )
    weights = _weights(weight, len(refs))
    folder = OutputFolder(Path(out), overwrite=overwrite)
    folder.check()
    checkpoint, opened = gather(
        None if base is None else os.fspath(base), refs, str(out), token, settings.notify
    )
    folder.refuse_inside([checkpoint.source.path, *(adapter.source.path for adapter in opened)])
    plan = make_plan(checkpoint, opened, weights, options)
    for doubt in doubts(checkpoint, opened):
        settings.warn(doubt)
    if dry_run:
        return DryRunReport.of(plan, settings, folder.out)
    with without_collections():
        from .produce import produce
    return produce(plan, folder, settings)


@contextmanager
def without_collections() -> Iterator[None]:
    """Import without garbage collections: importing torch makes no garbage, and looking for some takes a third of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()  # nor will there be any among it later
    finally:
        if enabled:
            gc.enable()


def _weights(given: Sequence[float], count: int) -> tuple[float, ...]:
    if given and len(given) != count:
        raise UsageError(f"{len(given)} --weight for {count} adapters.", hint="give one per ADAPTER, or none")
    return tuple(given) or (1.0,) * count
