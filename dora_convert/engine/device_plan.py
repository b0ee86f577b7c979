"""Fit a plan and its memory budget to a device."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..plan.item import Edit
from ..plan.large_blocks import in_large_blocks
from ..plan.plan import Plan
from ..settings import Settings, format_size
from .precision import ComputeSpec

DEVICE_MEMORY = 4 << 30
"""Bytes that workers hold by default on a device and for it: a dozen blocks on their way."""
FEWEST_WORKERS = 2
"""Workers for each device, unless the caller sets their number: one computes while one reads or writes."""
SPARE = 0.9
"""The share of a device's free memory that workers may hold: the allocator keeps pieces."""


def fit_settings(spec: ComputeSpec, settings: Settings, least: int = 0) -> None:
    """Set what the caller has not set for devices: workers for each, and the default budget, at most what is free.

    Host and device memory are counted together, so that neither is short of the budget.
    """
    if settings.default_workers:
        settings.workers = max(settings.workers, FEWEST_WORKERS * len(spec.devices))
    wanted = max(DEVICE_MEMORY, least) if settings.default_memory else settings.max_memory
    devices = {device for device in spec.devices if device.type == "cuda"} if torch.cuda.is_available() else ()
    free = [torch.cuda.mem_get_info(device)[0] for device in devices]
    most = int(SPARE * min(free)) if free else wanted
    if settings.max_memory != most < wanted:  # said once: a plan's large blocks come later
        settings.notify(f"memory: {format_size(most)}, as the device has no more free")
    settings.max_memory = min(wanted, most)


def cut_for(plan: Plan, spec: ComputeSpec, settings: Settings) -> Plan:
    """Return a plan in blocks for a device, and fit budget and workers; UsageError if the budget is below one block.

    A worker that must give its buffers back after each tensor is slower than none: pinned memory is dear.
    """
    plan = in_large_blocks(plan)
    fit_settings(spec, settings, plan.memory)
    settings.check_memory(plan.memory)
    if settings.workers > (most := max(len(spec.devices), settings.max_memory // max(1, plan.memory))):
        settings.workers = most
        settings.notify(f"workers: {most}, as {format_size(settings.max_memory)} hold no more")
    load_solvers(spec, (edit for item in plan.items for edit in item.edits))
    return plan


def load_solvers(spec: ComputeSpec, edits: Iterable[Edit] | None = None) -> None:
    """Load torch's solvers for a GPU, if any of the edits may need them; without edits in any case.

    torch fails if threads load them at the same time: "lazy wrapper should be called at most once".
    """
    if spec.device.type == "cuda" and (edits is None or any(edit.inner and not edit.low for edit in edits)):
        torch.linalg.inv(torch.eye(1, device=spec.device))
