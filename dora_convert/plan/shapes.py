"""Match an update with the tensor it is for, and find which way round the tensor is stored.

Shapes decide; for square weights, which shapes do not tell, the tables of `naming.families`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..adapters.adapter import Decomposed, Delta, Full, LowRank, Rows, Start, Update, low_rank
from ..naming.families import CONV1D_MODELS, CONV1D_MODULES, TURNED_EXPERTS
from ..storage.safetensors import FLOATS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mismatch:
    """The reason why an update does not match a tensor."""

    why: str


@dataclass(frozen=True)
class Match:
    """A matched update, and whether its weight is stored transposed."""

    update: Update
    transposed: bool = False


def match_shape(update: Update, name: str, shape: Shape, dtype: str, model_types: frozenset[str]) -> Match | Mismatch:
    """Match an update with a tensor of the output, given by its name, shape and dtype."""
    if dtype not in FLOATS and not (isinstance(update, Full) and update.value.dtype == dtype):
        return Mismatch(f"{name} is stored as {dtype}; quantised weights are not merged yet")
    if 0 in shape:
        return Mismatch(f"the base's {name} is empty, as ZeRO-3 leaves tensors that it does not gather")
    match update:
        case Full(value) if value.dtype not in FLOATS and value.dtype != dtype:
            return Mismatch(f"is saved as {value.dtype}, but {name} is {dtype}")
        case Full(value) | Delta(value):
            same = value.shape == shape
            return Match(update) if same else Mismatch(f"has shape {value.shape}; {name} has {shape}")
        case Rows():
            return _match_rows(update, name, shape)
        case LowRank() | Decomposed():
            return _match_low_rank(update, name, shape, model_types)


def _match_rows(update: Rows, name: str, shape: Shape) -> Match | Mismatch:
    value, index = update.value, update.index
    if value.dtype not in FLOATS or value.shape != (len(index), *shape[1:]):
        return Mismatch(f"has shape {value.shape} for {len(index)} rows of {name}, which has {shape}")
    if beyond := [row for row in index if row >= shape[0]]:
        return Mismatch(f"is for row {beyond[0]}; {name} has {shape[0]}")
    return Match(update)


def _match_low_rank(
    update: LowRank | Decomposed, name: str, shape: Shape, model_types: frozenset[str]
) -> Match | Mismatch:
    """Match factor shapes with the stored weight; the model's type decides for square weights."""
    low = low_rank(update)
    if len(shape) == 3 and len(low.A.shape) == len(low.B.shape) == 2:
        return _match_experts(update, replace(low, experts=low.experts or 1), shape, model_types)
    if low.experts > 1:
        return Mismatch(f"is for {low.experts} experts; {name} has shape {shape}")
    if isinstance(update, Decomposed) and update.m.numel != low.outputs:
        return Mismatch(f"its magnitude has {update.m.numel} elements for {low.outputs} outputs")
    wide = len(low.inputs) == 1 < len(shape) - 1  # AdaLoRA keeps a convolution's A flat
    stored = (shape[0], math.prod(shape[1:])) if wide else shape
    straight = stored == (low.outputs, *low.inputs) and low.B.shape[2:] == (1,) * (len(low.A.shape) - 2)
    turned = len(low.A.shape) == len(low.B.shape) == 2 and shape == (*low.inputs, low.outputs)
    if low.transposed is not None:
        straight, turned = straight and not low.transposed, turned and low.transposed
    if straight and turned:
        turned = is_conv1d(name, model_types)
        straight = not turned
    if turned and low.start in (Start.OLORA, Start.KASA):
        return Mismatch(f"{low.start.value} does not work on weights stored as (in, out)")
    return Match(update, transposed=turned) if straight or turned else _wrong_factors(low, shape)


def _match_experts(
    update: LowRank | Decomposed, low: LowRank, shape: Shape, model_types: frozenset[str]
) -> Match | Mismatch:
    """Match factors of all experts at once with one tensor of three dimensions."""
    if isinstance(update, Decomposed) or low.start or low.d or low.blocks != (1, 1):
        return Mismatch("only plain LoRA is trained on experts")
    count, rows, columns = shape
    straight = (low.outputs, *low.inputs) == (rows, columns)
    turned = (*low.inputs, low.outputs) == (rows, columns)
    if count != low.experts or not (straight or turned):
        return _wrong_factors(low, shape)
    if straight and turned:
        turned = low.square[0 if model_types & TURNED_EXPERTS else 1]
    return Match(low, transposed=turned)


def _wrong_factors(low: LowRank, shape: Shape) -> Mismatch:
    return Mismatch(f"lora_A {low.A.shape} and lora_B {low.B.shape} do not make its weight of shape {shape}")


def is_conv1d(tensor: str, model_types: frozenset[str]) -> bool:
    """Return True if transformers keeps a weight as Conv1D, by the model's type and the module's name."""
    module = tensor.rpartition(".")[0].rpartition(".")[2]
    return bool(model_types & CONV1D_MODELS) and module in CONV1D_MODULES
