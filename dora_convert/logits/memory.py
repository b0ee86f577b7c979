"""Estimate the memory of running a model, whole or one module at a time, before the model is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from ..errors import UsageError
from ..plan.plan import Plan
from ..settings import format_size

WIDTH = 4
"""Bytes of an element: all models run in float32."""
SHARE = 0.9
"""Share of the free memory that a model may take."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a comparison holds at most, beyond Python and its libraries."""

    whole: int
    """Need with one model loaded whole."""
    least: int
    """Need with only the largest module loaded."""


@dataclass(frozen=True)
class MemoryChoice:
    """The chosen way to run a comparison: whole models, or one module after the other."""

    offload: bool
    nbytes: int
    why: str


def skeleton(model_class: Any, config: Any) -> Any:
    """Return a model without weights, for its shapes."""
    with torch.device("meta"):
        build = getattr(model_class, "from_config", None) or model_class
        return build(config)


def units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that are loaded one at a time: unsplit blocks, and all modules beside them."""
    blocks, within = set(getattr(model, "_no_split_modules", None) or ()), "/"
    for name, module in model.named_modules(remove_duplicate=False):  # parents first
        owns = next(module.parameters(recurse=False), None) is not None or hasattr(module, "get_base_layer")
        wrapped = hasattr(module, "modules_to_save") and hasattr(module, "active_adapters")
        if not name.startswith(within) and (type(module).__name__ in blocks or owns or wrapped):
            within = f"{name}." if name else ""
            yield name, module


def estimate(model: nn.Module, config: Any, plan: Plan, tokens: int, longest: int) -> MemoryNeed:
    """Return the memory for `tokens` tokens at once, in prompts of at most `longest` tokens.

    Weights are counted. Activations are estimated: a few vectors of every width for each token, attention's
    scores, and four copies of the logits. Adapters are in memory, too. A DoRA layer's norm and the rounding
    floor need further copies of the largest weight that an adapter changes.
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
    return MemoryNeed(whole + extra, WIDTH * (max(sizes, default=0) + max(matrices, default=0) // 2) + extra)


def choose_memory(need: MemoryNeed, limit: int | None, device: torch.device) -> MemoryChoice:
    """Choose whole models if the memory holds one, else module after module.

    Raises UsageError if the limit, or the free memory without a limit, does not hold the largest module.
    """
    held = limit if limit is not None else int(SHARE * free_memory(device))
    what = f"{'--max-memory' if limit is not None else 'free'} {format_size(held)}"
    if need.whole <= held:
        return MemoryChoice(offload=False, nbytes=need.whole, why=what)
    if need.least <= held:
        return MemoryChoice(offload=True, nbytes=need.least, why=f"{what}, whole {format_size(need.whole)}")
    least = f"{-(-need.least // 2**20)}MiB"
    if limit is not None:
        raise UsageError(
            f"--max-memory {format_size(limit)} does not hold the model's largest module with activations.",
            hint=f"--max-memory {least} is the least",
        )
    raise UsageError(
        f"The model's largest module needs {least}, and {format_size(held)} of memory are free on {device}.",
        hint="verify --level weights needs less",
    )


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; on the CPU the memory that the system says is available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
