"""Fit a plan and its memory budget to a device."""

from __future__ import annotations

import torch

from ..plan.large_blocks import in_large_blocks
from ..plan.plan import Plan
from ..settings import Settings, format_size
from .precision import ComputeSpec

DEVICE_MEMORY = 4 << 30
"""Bytes that workers hold by default on a device and for it: a dozen blocks on their way."""
SPARE = 0.9
"""The share of a device's free memory that workers may hold: the allocator keeps pieces."""


def fit_memory(spec: ComputeSpec, settings: Settings, least: int = 0) -> None:
    """Set the budget for a device: the default for devices, if the caller has set none, and at most what is free.

    Host and device memory are counted together, so that neither is short of the budget.
    """
    wanted = max(DEVICE_MEMORY, least) if settings.default_memory else settings.max_memory
    devices = {device for device in spec.devices if device.type == "cuda"} if torch.cuda.is_available() else ()
    free = [torch.cuda.mem_get_info(device)[0] for device in devices]
    most = int(SPARE * min(free)) if free else wanted
    if settings.max_memory != most < wanted:  # said once: a plan's large blocks come later
        settings.notify(f"memory: {format_size(most)}, as the device has no more free")
    settings.max_memory = min(wanted, most)


def cut_for(plan: Plan, spec: ComputeSpec, settings: Settings) -> Plan:
    """Return a plan in blocks for a device, and fit the budget; UsageError if the budget is below one block."""
    plan = in_large_blocks(plan)
    fit_memory(spec, settings, plan.memory)
    settings.check_memory(plan.memory)
    return plan
