"""verify: whether a merged checkpoint does what base and adapters do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

from ..arrivals import bring_weights
from ..gather import gather
from ..heavy import without_collections
from ..page import check_page, write_page
from ..planner import make_plan
from ..refs import PathLike, listed
from ..remote import open_far
from ..settings import Settings, chosen, parse_options, parse_weights
from ..verified import VerifyReport


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
    refs = listed(adapters)
    weights = parse_weights(weight, len(refs))
    named = None if base is None else os.fspath(base)
    where = os.fspath(merged)
    opener = partial(open_far, "BASE", token, True, None)
    accepted = options.ignore_field
    checkpoint, opened = gather(named, refs, where, token, settings.notify, accepted, "verify", opener)
    made = open_far("MERGED", token, True, None, where, None)
    plan = make_plan(checkpoint, opened, weights, options)
    for each in (checkpoint, made):
        bring_weights(each, token)
    with without_collections():
        from ..verification import verify_weights
    found = verify_weights(plan, made, settings, samples)
    if report is not None:
        write_page(found, report)
    return found
