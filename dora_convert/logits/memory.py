"""How much memory running a model takes, whole or one module at a time, told from its config before it is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..plan.plan import Plan
from ..sizes import format_size

WIDTH = 4
"""Bytes of an element: everything runs in float32."""
SHARE = 0.9
"""Of the memory that is free, what a model may take."""


@dataclass(frozen=True)
class Need:
    """Bytes that a comparison holds at the most, beyond Python and its libraries."""

    whole: int
    """With one model loaded whole."""
    least: int
    """With the largest module loaded alone."""


@dataclass(frozen=True)
class Room:
    """How a comparison is run: whole models, or modules one after the other, and the memory that takes."""

    offload: bool
    nbytes: int
    why: str


def skeleton(model_class: Any, config: Any) -> Any:
    """A model without weights, for its shapes."""
    with torch.device("meta"):
        build = getattr(model_class, "from_config", None) or model_class
        return build(config)


def units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are loaded alone, by name: the model's own blocks, which are never split, and what is beside them."""
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    yield from _units(model, "", blocks)


def _units(module: nn.Module, name: str, blocks: set[str]) -> Iterator[tuple[str, nn.Module]]:
    kind = type(module).__name__
    owns = next(module.parameters(recurse=False), None) is not None or hasattr(module, "get_base_layer")
    wrapped = hasattr(module, "modules_to_save") and hasattr(module, "active_adapters")
    if kind in blocks or owns or wrapped:
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _units(inner, f"{name}.{child}" if name else child, blocks)


def estimate(model: nn.Module, config: Any, plan: Plan, tokens: int, longest: int) -> Need:
    """What running a model takes, on so many tokens at once, `longest` of them in one prompt.

    Weights are counted; of activations it is an estimate: a few vectors of every width a token, attention's scores,
    and four copies of the logits. Besides, adapters are in memory, and a DoRA layer's norm and the rounding floor need
    the largest weight that an adapter is on anew.
    """
    sizes = [sum(p.numel() for p in unit.parameters()) for _, unit in units(model)]
    matrices = [p.numel() for p in model.parameters() if p.ndim > 1]
    text = config.get_text_config()
    hidden = getattr(text, "hidden_size", None) or 1024
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    heads = getattr(text, "num_attention_heads", None) or 16
    classes = getattr(text, "vocab_size", None) or hidden
    activations = tokens * (16 * hidden + 4 * inner + 4 * classes + 2 * heads * longest)
    factors = sum(tensor.numel for adapter in plan.adapters for tensor in adapter.tensors.values())
    merged = max((math.prod(item.shape) for item in plan.items if item.edits), default=0)
    extra = WIDTH * (activations + 4 * merged + factors)
    whole = WIDTH * sum({id(p): p.numel() for p in model.parameters()}.values())
    return Need(whole + extra, WIDTH * (max(sizes, default=0) + max(matrices, default=0) // 2) + extra)


def find_room(need: Need, limit: int | None, device: torch.device) -> Room:
    """Whole models where there is room for one, else module after module.

    Raises UsageError where a limit, or the machine, does not hold the largest module.
    """
    room = limit if limit is not None else int(SHARE * free_memory(device))
    what = "--max-memory" if limit is not None else "free"
    if need.whole <= room:
        return Room(offload=False, nbytes=need.whole, why=f"{what} {format_size(room)}")
    if need.least <= room:
        return Room(
            offload=True,
            nbytes=need.least,
            why=f"{what} {format_size(room)}, whole {format_size(need.whole)}",
        )
    least = f"{-(-need.least // 2**20)}MiB"
    if limit is not None:
        raise UsageError(
            f"--max-memory {format_size(limit)} does not hold the model's largest module and its activations.",
            hint=f"--max-memory {least} is the least",
        )
    raise UsageError(
        f"The model's largest module needs {least}, and {format_size(room)} of memory are free on {device}.",
        hint="verify --level weights needs less",
    )


def free_memory(device: torch.device) -> int:
    """Bytes that a device has free; on the CPU what the system says that programs may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - no file of anybody's
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62
