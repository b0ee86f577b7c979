"""Perturb a model's weights by half a unit in the last place, to measure the effect of rounding.

A base is stored in the dtype that it is merged into, so a cast through that dtype changes nothing. The
rounding of a merge leaves an error of up to half a unit in the last place in every element, of random sign.
The weights that adapters change are therefore perturbed by as much, at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from ..deferred_imports import seeded

WRAPPED = (".base_layer", ".original_module", ".modules_to_save.default", ".token_adapter")
"""Parts that PEFT adds to the names of weights."""


def plain_name(name: str) -> str:
    """Return a parameter's name in the model without PEFT."""
    name = name.removeprefix("base_model.model.")
    for part in WRAPPED:
        name = name.replace(part, "")
    return name


def half_ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return half a unit in the last place of each element in a dtype, as far as float32 can hold it."""
    finest = torch.finfo(dtype if dtype.itemsize < 4 else torch.float32)
    magnitude = x.abs().clamp_min(finest.tiny)
    return torch.ldexp(torch.full_like(magnitude, finest.eps / 4), torch.frexp(magnitude).exponent)


def perturb(root: nn.Module, prefix: str, stored: Mapping[str, torch.dtype], usual: torch.dtype, draw: int) -> None:
    """Perturb the weights below a module that adapters change, and round all others to their stored dtype.

    `prefix` is the module's name with its dot, `stored` the dtypes of a merged checkpoint's tensors, `usual`
    the commonest of them. The same `draw` perturbs the same weights by the same amounts.
    """
    perturbed: set[int] = set()
    for name, layer in root.named_modules():
        if rows := getattr(layer, "trainable_tokens_delta", None):
            for value in rows.values():
                value.data.copy_(value.data.to(usual))
        elif hasattr(layer, "get_base_layer") and hasattr(layer, "active_adapters"):
            plain = plain_name(f"{prefix}{name}".rstrip("."))
            for number, (key, weight, delta) in enumerate(_weights(layer)):
                if id(weight) not in perturbed:
                    perturbed.add(id(weight))
                    seed = xxhash.xxh3_64_intdigest(f"{plain}/{number}/{draw}".encode()) >> 1
                    _add_noise(weight, delta, stored.get(f"{plain}.{key}", usual), seed)
    for name, value in root.named_parameters():
        dtype = stored.get(plain_name(prefix + name))
        floating = value.is_floating_point() and id(value) not in perturbed
        if floating and dtype and dtype.itemsize < value.element_size():
            value.data.copy_(value.data.to(dtype))


def _weights(layer: Any) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield the name and value of an adapted layer's weights, and the active adapters' ΔW if known."""
    base = layer.get_base_layer()
    key = getattr(layer, "parameter_name", "weight")
    if (weight := getattr(base, key, None)) is not None:
        yield key, weight, _delta(layer, weight)
    else:
        yield from ((name, value, None) for name, value in base.named_parameters())
    bias = getattr(base, "bias", None)
    if bias is not None and any(getattr(layer, "lora_bias", {}).values()):
        yield "bias", bias, None


@torch.no_grad()
def _delta(layer: Any, weight: Tensor) -> Tensor | None:
    """Return the sum of the active adapters' ΔW; None for layers without a ΔW in PEFT."""
    total = None
    for adapter in layer.active_adapters:
        try:
            delta = layer.get_delta_weight(adapter)
        except (AttributeError, KeyError, NotImplementedError, TypeError, RuntimeError):
            continue
        if isinstance(delta, Tensor) and delta.shape == weight.shape:
            total = delta if total is None else total + delta
    return total


def _add_noise(weight: Tensor, delta: Tensor | None, dtype: torch.dtype, seed: int) -> None:
    """Add noise between −½ and ½ unit in the last place of each merged element."""
    generator = seeded(seed)
    noise = torch.rand(weight.shape, generator=generator).mul_(2).sub_(1).to(weight.device)
    merged = weight.data if delta is None else weight.data + delta.to(weight.dtype)
    weight.data.add_(noise.mul_(half_ulp(merged.float(), dtype)).to(weight.dtype))
