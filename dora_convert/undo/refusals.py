"""Refuse options and inputs of an in-place run before any checkpoint is opened."""

from __future__ import annotations

import os

from ..errors import UsageError
from ..storage.refs import HubRef, PathLike, parse_ref


def refuse_options(*, in_place: bool, overwrite: bool, allow_lossy: bool) -> None:
    """Refuse options that have no meaning with `--in-place`, or none without it."""
    if in_place and overwrite:
        raise UsageError("--in-place writes no OUT that --overwrite could replace.")
    if allow_lossy and not in_place:
        raise UsageError(
            "--allow-lossy goes with --in-place.", hint="a merge into OUT loses nothing: BASE stays"
        )


def refuse_far(ref: PathLike, what: str) -> None:
    """Refuse a repo on the Hub before any download: only a folder on this machine can be changed."""
    if isinstance(parsed := parse_ref(os.fspath(ref), what), HubRef):
        raise UsageError(
            f"--in-place changes a folder on this machine; {what} {parsed} is on the Hub.",
            hint="name an OUT instead, or download it first",
        )


def refuse_lossy(undo: str, *, allow_lossy: bool) -> None:
    """Refuse a lossy undo record unless `allow_lossy`: in place there is no other copy of the weights."""
    if undo != "exact" and not allow_lossy:
        raise UsageError(
            f"--in-place with --undo {undo} would lose what this folder holds now.",
            hint="--undo exact keeps it; --allow-lossy does without",
        )
