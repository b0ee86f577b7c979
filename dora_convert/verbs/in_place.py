"""Check the options of merge and unmerge in place, and open the checkpoint that they change."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import RefError, UnsupportedError, UsageError
from ..options import MergeOptions, UnmergeOptions, flag
from ..output.in_place import InPlace
from ..output.receipt import read_receipt
from ..plan.plan import Plan
from ..storage.filenames import RECORD
from ..storage.reader import xxh3
from ..storage.refs import HubRef, PathLike, parse_ref

InPlaceOptions = MergeOptions | UnmergeOptions


def refuse_options(options: InPlaceOptions) -> None:
    """Raise UsageError for options that mean nothing in place, or mean nothing elsewhere."""
    if options["in_place"] and options["overwrite"]:
        raise UsageError("--in-place writes no OUT that --overwrite could replace.")
    for name in ("dequantize", "dequantize_touched", "requantize", "base_as"):
        if options["in_place"] and options.get(name):
            raise UsageError(f"{flag(name)} does not go with --in-place.", hint="name an OUT instead")
    if options["allow_lossy"] and not options["in_place"]:
        raise UsageError("--allow-lossy goes with --in-place.", hint="a merge into OUT loses nothing: BASE stays")


def refuse_lossy(undo: str, options: InPlaceOptions) -> None:
    """Raise UsageError if the undo record is not exact: in place, the folder is the only copy."""
    if undo != "exact" and not options["allow_lossy"]:
        raise UsageError(
            f"--in-place with --undo {undo} would lose what this folder holds now.",
            hint="--undo exact keeps it; --allow-lossy does without",
        )


def refuse_out(ref: PathLike | None, role: str, out: PathLike | None) -> PathLike:
    """Return the local checkpoint to change; UsageError for an OUT, or a repo before it is downloaded."""
    if ref is None or out is not None:
        raise UsageError(f"--in-place takes {role} and ADAPTER, and no OUT.")
    if isinstance(parsed := parse_ref(os.fspath(ref), role), HubRef):
        raise UsageError(
            f"--in-place changes a folder on this machine; {role} {parsed} is on the Hub.",
            hint="name an OUT instead, or download it first",
        )
    return ref


@contextmanager
def last_word(adapters: Sequence[str]) -> Iterator[None]:
    """Say of an ADAPTER that cannot be opened that it may have been meant as OUT, which --in-place does not take."""
    try:
        yield
    except RefError as error:
        if len(adapters) > 1:
            error.hint = f"--in-place takes no OUT: leave {adapters[-1]} out if that is one"
        raise


def open_place(plan: Plan) -> InPlace:
    """Return the base's folder as the output of a plan; UnsupportedError if it cannot be changed in place."""
    checkpoint = plan.base
    if any(item.source.coded for item in plan.items):
        raise UnsupportedError(
            f"{checkpoint.source.name} is quantised, and its quantised weights are not changed in place.",
            hint="name an OUT instead; --dequantize goes with it",
        )
    if any(edit.follows and edit.divides for item in plan.items if not item.undo for edit in item.edits):
        raise UnsupportedError(
            "The adapter scales biases by the norms of their weights, which a merge in place may have changed already.",
            hint="name an OUT instead",
        )
    place = InPlace(checkpoint.source.path, checkpoint.shards, checkpoint.index_name)
    place.refuse(plan)
    return place


def refuse_merged(plan: Plan, place: InPlace) -> None:
    """Raise UsageError if the last merge of a checkpoint was of the same adapters with the same weights."""
    if place.begun or not (receipt := read_receipt(plan.base.root / RECORD)):
        return
    hashes = [{path.name: xxh3(path) for path in adapter.files} for adapter in plan.adapters]
    merged = [adapter.files for adapter in receipt.adapters]
    if plan.weights == receipt.weights and hashes == merged:
        raise UsageError(
            f"{place.given} is merged with the very same adapter already.",
            hint=f"dora-convert unmerge --in-place {place.given} ADAPTER takes it out again",
        )
