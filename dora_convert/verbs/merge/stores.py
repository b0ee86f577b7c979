"""Merge from and to object stores: what goes with it, and the folder that the output passes through."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from ...errors import UsageError
from ...hub.store_streaming import StoreStreaming, stream_stores, transit_folder
from ...options import MergeOptions
from ...output.folder import OutputFolder
from ...plan.plan import Plan
from ...sources.object_store import check_address
from ...storage.refs import PathLike, is_stored


def folder_for(out: PathLike, refs: Sequence[PathLike | None], options: MergeOptions) -> Path:
    """Return the folder on this machine for an OUT in a store; raises UsageError for options that need OUT itself."""
    if options["push_to_hub"] or options["verify_outputs"]:
        raise UsageError(
            f"OUT {out} goes neither with --push-to-hub nor with --verify-outputs.",
            hint="name a folder, and copy it afterwards",
        )
    check_address(str(out))
    return transit_folder(str(out), refs)


def streaming_for(
    out: PathLike | None, options: MergeOptions, plan: Plan, folder: OutputFolder
) -> AbstractContextManager[StoreStreaming]:
    """Return the transfers of a merge whose base stays in a store, or whose output goes to one."""
    if options["push_to_hub"]:
        raise UsageError("--push-to-hub takes no base from an object store.", hint="push OUT afterwards")
    url, nodes = str(out) if is_stored(out) else None, options["cluster"] is not None
    return stream_stores(plan, url, folder, overwrite=options["overwrite"], nodes=nodes)
