"""Merge from and to object stores: what goes with it, and the folder that the output passes through."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...hub.store_streaming import StoreStreaming, stream_stores, transit_folder
from ...output.folder import OutputFolder
from ...plan.plan import Plan
from ...storage.refs import is_stored

if TYPE_CHECKING:
    from . import MergeRequest


def folder_for(request: MergeRequest) -> Path:
    """Return the folder on this machine for an OUT in a store; UsageError for options that need OUT itself."""
    if request.target or request.options["cluster"] or request.options["verify_outputs"]:
        raise UsageError(
            f"OUT {request.out} goes with none of --push-to-hub, --cluster and --verify-outputs.",
            hint="name a folder, and copy it afterwards",
        )
    return transit_folder(str(request.out), [request.base, *request.adapters])


def streaming_for(request: MergeRequest, plan: Plan, folder: OutputFolder) -> AbstractContextManager[StoreStreaming]:
    """Return the transfers of a merge whose base stays in a store, or whose output goes to one."""
    if request.target:
        raise UsageError("--push-to-hub takes no base from an object store.", hint="push OUT afterwards")
    out = str(request.out) if is_stored(request.out) else None
    return stream_stores(plan, out, folder, overwrite=request.options["overwrite"])
