"""Match an update with the tensor it is for, and find which way round the tensor is stored.

Shapes decide; for square weights, which shapes do not tell, the tables of `naming.families`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..adapters import Decomposed, Delta, Full, LowRank, Rows, Start, Update, low_rank
from ..naming.families import CONV1D_MODELS, CONV1D_MODULES, TURNED_EXPERTS
from ..naming.resolve import is_embedding, is_head
from ..storage.reader import same_bytes
from ..storage.safetensors import FLOATS, StoredTensor
from .item import Edit

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """A matched update, and whether its weight is stored transposed."""

    update: Update
    transposed: bool = False


@dataclass
class TargetTensor:
    """One tensor of the output, as far as it has been decided."""

    source: StoredTensor
    base: StoredTensor | None
    added: bool = False
    replacer: str = ""
    """The adapter whose tensor `source` is."""
    rows: list[Rows] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape, with the rows that adapters add below those of `source`."""
        new = [1 + max(rows.index, default=-1) for rows in self.rows]
        return (max(self.source.shape[0], *new), *self.source.shape[1:]) if new else self.source.shape


def match_shape(update: Update, name: str, shape: Shape, dtype: str, model_types: frozenset[str]) -> Match | str:
    """Match an update with a tensor of the output, given by its name, shape and dtype; else return the reason."""
    if dtype not in FLOATS and not (isinstance(update, Full) and update.value.dtype == dtype):
        return f"{name} is stored as {dtype}; quantised weights are not merged yet"
    if 0 in shape:
        return f"the base's {name} is empty, as ZeRO-3 leaves tensors that it does not gather"
    match update:
        case Full(value) if value.dtype not in FLOATS and value.dtype != dtype:
            return f"is saved as {value.dtype}, but {name} is {dtype}"
        case Full(value) | Delta(value):
            return Match(update) if value.shape == shape else f"has shape {value.shape}; {name} has {shape}"
        case Rows(value, index):
            if value.dtype not in FLOATS or value.shape != (len(index), *shape[1:]):
                return f"has shape {value.shape} for {len(index)} rows of {name}, which has {shape}"
            return _misplaced(index, name, shape[0]) or Match(update)
        case LowRank() | Decomposed(LowRank(), axis="rows", norm_scale=None, normalised=False):
            return _match_low_rank(update, name, shape, model_types)
    return f"is {update.title}, which this version does not merge yet"


def _misplaced(index: Sequence[int], name: str, height: int) -> str | None:
    """Return why some rows do not fit a tensor; an embedding or a head may get new rows without a gap."""
    new = {row for row in index if row >= height}
    if new and not (is_embedding(name) or is_head(name)):
        return f"is for row {min(new)}; {name} has {height}"
    missing = next((row for row in range(height, height + len(new)) if row not in new), None)
    return None if missing is None else f"row {missing} of {name} is new, and no file has it"


def _match_low_rank(update: LowRank | Decomposed, name: str, shape: Shape, model_types: frozenset[str]) -> Match | str:
    """Match factor shapes with the stored weight; the model's type decides for square weights."""
    low = low_rank(update)
    assert low
    if low.b:
        return "has a diagonal on lora_B, which this version does not merge yet"
    if len(shape) == 3 and len(low.A.shape) == len(low.B.shape) == 2:
        return _match_experts(update, replace(low, experts=low.experts or 1), shape, model_types)
    if low.experts > 1:
        return f"is for {low.experts} experts; {name} has shape {shape}"
    if isinstance(update, Decomposed) and update.m.numel != low.outputs:
        return f"its magnitude has {update.m.numel} elements for {low.outputs} outputs"
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
        return f"{low.start.value} does not work on weights stored as (in, out)"
    return Match(update, transposed=turned) if straight or turned else _wrong_factors(low, shape)


def _match_experts(
    update: LowRank | Decomposed, low: LowRank, shape: Shape, model_types: frozenset[str]
) -> Match | str:
    """Match factors of all experts at once with one tensor of three dimensions."""
    if isinstance(update, Decomposed) or low.start or low.d or low.blocks != (1, 1):
        return "only plain LoRA is trained on experts"
    count, rows, columns = shape
    straight = (low.outputs, *low.inputs) == (rows, columns)
    turned = (*low.inputs, low.outputs) == (rows, columns)
    if low.transposed is not None:
        straight, turned = straight and not low.transposed, turned and low.transposed
    if count != low.experts or not (straight or turned):
        return _wrong_factors(low, shape)
    if straight and turned:
        turned = low.square[0 if model_types & TURNED_EXPERTS else 1]
    return Match(low, transposed=turned)


def _wrong_factors(low: LowRank, shape: Shape) -> str:
    return f"lora_A {low.A.shape} and lora_B {low.B.shape} do not make its weight of shape {shape}"


def is_conv1d(tensor: str, model_types: frozenset[str]) -> bool:
    """Return True if transformers keeps a weight as Conv1D, by the model's type and the module's name."""
    module = tensor.rpartition(".")[0].rpartition(".")[2]
    return bool(model_types & CONV1D_MODELS) and module in CONV1D_MODULES


def begins_elsewhere(update: Update) -> str | None:
    """Return why an update to a weight that serves twice cannot be merged; None if it can."""
    begun = update if isinstance(update, Full) else low_rank(update)
    if begun and (start := begun.start):
        return f"{start.value} changed a weight that serves twice: what training began with is not known"
    return None


def is_copy(one: Update, other: Update) -> bool:
    """Return True if an adapter brings the same tensor for both sides of a tie."""
    match one, other:
        case Full(value), Full(copy):
            return same_bytes(value, copy)
        case Rows(value, index), Rows(copy, numbers):
            return index == numbers and same_bytes(value, copy)
    return False
