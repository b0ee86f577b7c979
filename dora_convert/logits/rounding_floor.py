"""What rounding merged weights into their stored dtype does to a model: the same model, moved by half a unit.

A base is stored in the dtype that it is merged into, so casting it through that dtype changes nothing. What a merge's
rounding leaves is an error of up to half a unit in the last place in every element, of no particular sign: so the
weights that adapters have a part in are moved by as much, at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

WRAPPED = (".base_layer", ".original_module", ".modules_to_save.default", ".token_adapter")
"""What PEFT puts into the names of weights."""


def plain_name(name: str) -> str:
    """A parameter's name in the model without PEFT."""
    name = name.removeprefix("base_model.model.")
    for part in WRAPPED:
        name = name.replace(part, "")
    return name


def half_ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of each element in a dtype, as far as float32 can show it."""
    finest = torch.finfo(dtype if dtype.itemsize < 4 else torch.float32)
    magnitude = x.abs().clamp_min(finest.tiny)
    return torch.ldexp(torch.full_like(magnitude, finest.eps / 4), torch.frexp(magnitude).exponent)


def disturb(
    root: nn.Module, prefix: str, stored: Mapping[str, torch.dtype], usual: torch.dtype, draw: int
) -> None:
    """Move what adapters have a part in below a module by up to half a unit; round all else to what it is stored in.

    `prefix` is the module's name with its dot, `stored` the dtypes of a merged checkpoint's tensors, `usual` the
    commonest of them. The same `draw` moves the same weights by the same amounts.
    """
    moved: set[int] = set()
    for name, layer in root.named_modules():
        if rows := getattr(layer, "trainable_tokens_delta", None):
            for value in rows.values():
                value.data.copy_(value.data.to(usual))
        elif hasattr(layer, "get_base_layer") and hasattr(layer, "active_adapters"):
            plain = plain_name(f"{prefix}{name}".rstrip("."))
            for number, (key, weight, delta) in enumerate(_weights(layer)):
                if id(weight) not in moved:
                    moved.add(id(weight))
                    _move(weight, delta, stored.get(f"{plain}.{key}", usual), _seed(plain, number, draw))
    for name, value in root.named_parameters():
        to = stored.get(plain_name(prefix + name))
        if id(value) not in moved and to and value.is_floating_point() and to.itemsize < value.element_size():
            value.data.copy_(value.data.to(to))


def _seed(name: str, number: int, draw: int) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(f"{name}/{number}/{draw}".encode()) >> 1


def _weights(layer: Any) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """The weights of a layer with adapters, by name, and what the active ones add to them, where PEFT tells."""
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
    """What active adapters add, in the weight's shape; None where PEFT has no such notion for the layer."""
    total = None
    for adapter in layer.active_adapters:
        try:
            found = layer.get_delta_weight(adapter)
        except (AttributeError, KeyError, NotImplementedError, TypeError, RuntimeError):
            continue
        if isinstance(found, Tensor) and found.shape == weight.shape:
            total = found if total is None else total + found
    return total


def _move(weight: Tensor, delta: Tensor | None, dtype: torch.dtype, seed: int) -> None:
    """Add noise between −½ and ½ unit in the last place of what the merged element is."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(weight.shape, generator=generator).mul_(2).sub_(1).to(weight.device)
    around = weight.data if delta is None else weight.data + delta.to(weight.dtype)
    weight.data.add_(noise.mul_(half_ulp(around.float(), dtype)).to(weight.dtype))
