"""The verbs: what the command line and Python callers run. Each gathers, plans, checks, runs and reports."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .checkpoint import open_checkpoint
from .folder import OutputFolder
from .gather import doubts, gather
from .hub import fetch, wanted_of_base
from .inspected import AdapterReport, CheckpointReport
from .inspection import inspect_ref
from .page import check_page, write_page
from .plan import Options, Plan
from .planner import make_plan
from .report import DryRunReport, MergeReport
from .settings import Settings, chosen, parse_options, parse_weights
from .verified import VerifyReport

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
    ignore_field: Sequence[str] = (),
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
    options = parse_options(
        dtype, compute_dtype, max_shard_size, undo, include, exclude, allow_unmatched, ignore_field
    )
    settings = Settings.parse(
        device, compute_dtype, max_memory, workers, verify, base_model, on_progress, on_notice, token
    )
    inputs = [adapters] if isinstance(adapters, (str, os.PathLike)) else adapters
    folder = OutputFolder(Path(out), overwrite=overwrite)
    folder.check()
    plan = _plan(base, [os.fspath(ref) for ref in inputs], weight, options, settings, folder)
    if dry_run:
        return DryRunReport.of(plan, settings, folder.given)
    with without_collections():
        from .produce import produce
    return produce(plan, folder, settings)


def inspect(
    ref: PathLike,
    base: PathLike | None = None,
    *,
    ignore_field: Sequence[str] = (),
    token: str | None = None,
) -> AdapterReport | CheckpointReport:
    """What is this? Told from headers and small files alone; of a model on the Hub no weights are downloaded.

    `ref` is an adapter or a checkpoint. With `base`, the report of an adapter says where each of its tensors would land
    in it, or everything that does not fit.

    Raises DoraConvertError for what cannot be read, or is neither.
    """
    return inspect_ref(os.fspath(ref), None if base is None else os.fspath(base), ignore_field, token)


def _plan(
    base: PathLike | None,
    adapters: Sequence[str],
    weight: Sequence[float],
    options: Options,
    settings: Settings,
    folder: OutputFolder,
) -> Plan:
    """Gather the inputs and decide every output tensor; what looks odd is warned of."""
    weights = parse_weights(weight, len(adapters))
    named = None if base is None else os.fspath(base)
    checkpoint, opened = gather(
        named, adapters, folder.given, settings.token, settings.notify, options.ignore_field
    )
    folder.refuse_inside([checkpoint.source.path, *(adapter.source.path for adapter in opened)])
    for doubt in doubts(checkpoint, opened):
        settings.warn(doubt)
    return make_plan(checkpoint, opened, weights, options)


def verify(
    base: PathLike | None,
    adapters: PathLike | Sequence[PathLike],
    merged: PathLike,
    *,
    level: str = "weights",
    weight: Sequence[float] = (),
    samples: int = 8,
    max_memory: str | int = "160MiB",
    workers: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unmatched: bool = False,
    ignore_field: Sequence[str] = (),
    token: str | None = None,
    report: PathLike | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Does `merged` do what base and adapters do? Every element is compared with the float64 result.

    `samples` is the number of random inputs whose outputs are compared, too. The report's `verdict` is "agree" or
    "differ"; where that cannot be decided, because something is missing or malformed, DoraConvertError is raised.
    `report` is a path for an HTML page of it; a file there is replaced.
    """
    chosen(level, {"weights": level}, "--level")
    options = parse_options("auto", "auto", None, "none", include, exclude, allow_unmatched, ignore_field)
    settings = Settings.parse("cpu", "auto", max_memory, workers, True, None, on_progress, on_notice, token)
    if report is not None:
        check_page(report)
    inputs = [adapters] if isinstance(adapters, (str, os.PathLike)) else adapters
    refs = [os.fspath(ref) for ref in inputs]
    weights = parse_weights(weight, len(refs))
    named = None if base is None else os.fspath(base)
    where = os.fspath(merged)
    checkpoint, opened = gather(named, refs, where, token, settings.notify, options.ignore_field)
    made = open_checkpoint(fetch(where, "MERGED", wanted_of_base, token=token))
    plan = make_plan(checkpoint, opened, weights, options)
    with without_collections():
        from .verification import verify_weights
    found = verify_weights(plan, made, settings, samples)
    if report is not None:
        write_page(found, report)
    return found


@contextmanager
def without_collections() -> Iterator[None]:
    """Import without garbage collections: importing torch makes no garbage, and looking for some takes a third of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with _uninterrupted():
            yield
        gc.freeze()  # nor will there be any among it later
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back: in the middle of importing torch it is lost, or ends the process without a word."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
