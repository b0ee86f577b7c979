"""Match an update with the tensor it is for, and find which way round the tensor is stored.

Shapes decide; for square weights, which shapes do not tell, the tables of `naming.families`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..adapters import Change, Decomposed, Delta, Full, LowRank, Rows, Start, Transform, Update, low_rank, transform_of
from ..naming.families import CONV1D_MODELS, CONV1D_MODULES, TURNED_EXPERTS
from ..naming.resolve import is_embedding, is_head
from ..records import record
from ..storage.reader import same_bytes
from ..storage.safetensors import FLOATS, StoredTensor
from .item import Edit

Shape = tuple[int, ...]
EVERY: tuple[tuple[float, float], ...] = ((0, math.inf),)
"""All outputs of a tensor."""


@record(frozen=True)
class Match:
    """A matched update, whether its weight is stored transposed, and the columns that share a magnitude."""

    update: Update
    transposed: bool = False
    kernel: int = 1


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


class ClaimedOutputs:
    """The outputs of tensors that one adapter adds to."""

    def __init__(self) -> None:
        self._claimed: dict[str, tuple[tuple[float, float], ...]] = {}

    def add(self, name: str, outputs: tuple[int, int] | None) -> bool:
        """Note some outputs of a tensor, or all; return False if some of them are noted already."""
        first, last = outputs or EVERY[0]
        claimed = self._claimed.get(name, ())
        if claimed and any(first < end and start < last for start, end in claimed):
            return False
        self._claimed[name] = (*claimed, outputs) if outputs else EVERY
        return True


def match_shape(update: Update, name: str, shape: Shape, dtype: str, model_types: frozenset[str]) -> Match | str:
    """Match an update with a tensor of the output, given by its name, shape and dtype; else return the reason."""
    if dtype not in FLOATS and not (isinstance(update, Full) and update.value.dtype == dtype):
        return f"{name} is stored as {dtype}; quantised weights are not merged yet"
    if 0 in shape:
        return f"the base's {name} is empty, as ZeRO-3 leaves tensors that it does not gather"
    if _fits_one_way(update, shape):
        return Match(update)
    match update:
        case Full(value) if value.dtype not in FLOATS and value.dtype != dtype:
            return f"is saved as {value.dtype}, but {name} is {dtype}"
        case Full(value) | Delta(value):
            return Match(update) if value.shape == shape else f"has shape {value.shape}; {name} has {shape}"
        case Rows(value, index):
            if value.dtype not in FLOATS or value.shape != (len(index), *shape[1:]):
                return f"has shape {value.shape} for {len(index)} rows of {name}, which has {shape}"
            return _misplaced(index, name, shape[0]) or Match(update)
        case Transform():
            return _match_transform(update, name, shape, model_types)
        case Decomposed():
            return _match_decomposed(update, name, shape, model_types)
    return Match(update) if len(shape) == 1 else f"is {update.title}; {name} has shape {shape}"


def _fits_one_way(update: Update, shape: Shape) -> bool:
    """Return True for plain factors of a matrix that is not square, and for their magnitudes: nearly all are such."""
    low = update.inner if isinstance(update, Decomposed) else update
    if not isinstance(low, LowRank) or low.widest or low.experts or low.transposed or low.blocks != (1, 1):
        return False
    A, B = low.A.shape, low.B.shape
    if not len(A) == len(B) == len(shape) == 2 or (B[0], A[1]) != shape or B[0] == A[1]:
        return False
    return not isinstance(update, Decomposed) or (update.axis == "rows" and update.m.shape == B[:1])


def _misplaced(index: Sequence[int], name: str, height: int) -> str | None:
    """Return why some rows do not fit a tensor; an embedding or a head may get new rows without a gap."""
    new = {row for row in index if row >= height}
    if new and not (is_embedding(name) or is_head(name)):
        return f"is for row {min(new)}; {name} has {height}"
    missing = next((row for row in range(height, height + len(new)) if row not in new), None)
    return None if missing is None else f"row {missing} of {name} is new, and no file has it"


def _match_decomposed(update: Decomposed, name: str, shape: Shape, model_types: frozenset[str]) -> Match | str:
    """Match what makes V, and the magnitudes, whose number follows the axis."""
    inner, m = update.inner, update.m
    if inner:
        match = _match_transform(inner, name, shape, model_types)
    else:
        match = _match_magnitudes(update, name, shape, model_types)
    if isinstance(match, str):
        return match
    if len(shape) > 2 and isinstance(match.update, LowRank) and match.update.experts:
        return "only plain LoRA is trained on experts"
    inputs, outputs = (shape[0], shape[1]) if match.transposed else (math.prod(shape[1:2]), shape[0])
    count, what = (inputs, "inputs") if update.axis == "columns" else (outputs, "outputs")
    if m.numel != count:
        return f"its magnitude has {m.numel} elements for {count} {what}"
    kernel = math.prod(shape[2:]) if update.axis == "columns" else 1
    if inner and match.update is not inner:
        update = replace(update, inner=transform_of(match.update))
    return Match(update, match.transposed, kernel)


def _match_magnitudes(update: Decomposed, name: str, shape: Shape, model_types: frozenset[str]) -> Match | str:
    """Match magnitudes alone, which tell the orientation of weights that are not square."""
    if len(shape) != 2:
        return Match(update)
    by_inputs = update.axis == "columns"
    straight, turned = (update.m.numel == shape[1 if side == by_inputs else 0] for side in (True, False))
    return Match(update, transposed=turned and (not straight or is_conv1d(name, model_types)))


def _match_transform(update: Transform, name: str, shape: Shape, model_types: frozenset[str]) -> Match | str:
    """Match the shape that an update is for with the stored weight; the model's type decides for square weights."""
    if isinstance(update, LowRank):
        return _match_low_rank(update, name, shape, model_types)
    outputs, inputs = update.outputs, update.inputs and math.prod(update.inputs)
    rows, columns = shape[0], math.prod(shape[1:])
    straight = outputs in (None, rows) and inputs in (None, columns)
    turned = len(shape) == 2 and outputs in (None, columns) and inputs in (None, rows)
    if update.transposed is not None:
        straight, turned = straight and not update.transposed, turned and update.transposed
    if straight and turned:
        turned = is_conv1d(name, model_types)
    elif not (straight or turned):
        wanted = ["any" if side is None else side for side in (outputs, inputs)]
        return f"is {update.title} for a weight of {wanted[0]} × {wanted[1]}; {name} has shape {shape}"
    return Match(update.shaped(*((columns, rows) if turned else (rows, columns))), transposed=turned)


def _match_low_rank(low: LowRank, name: str, shape: Shape, model_types: frozenset[str]) -> Match | str:
    """Match factor shapes with the stored weight; the model's type decides for square weights."""
    if len(shape) == 3 and len(low.A.shape) == len(low.B.shape) == 2:
        return _match_experts(replace(low, experts=low.experts or 1), shape, model_types)
    if low.experts > 1:
        return f"is for {low.experts} experts; {name} has shape {shape}"
    if low.widest and len(shape) == 2:  # A serves all weights, and each has its first columns
        from ..storage.stored_view import view

        inputs = shape[0] if low.outputs == shape[1] and low.outputs != shape[0] else shape[1]
        if inputs > low.A.shape[1]:
            return _wrong_factors(low, shape)
        low = replace(low, A=view(low.A, columns=range(inputs)), widest=False)
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
    return Match(low, transposed=turned) if straight or turned else _wrong_factors(low, shape)


def _match_experts(low: LowRank, shape: Shape, model_types: frozenset[str]) -> Match | str:
    """Match factors of all experts at once with one tensor of three dimensions."""
    if low.start or low.d or low.blocks != (1, 1):
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


def turn_of(change: Change) -> int:
    """Return a sort key that puts replacements before additions."""
    return 0 if isinstance(change.update, Full) else 1 if isinstance(change.update, Rows) else 2


def stacked(tensor: StoredTensor, edits: Sequence[Edit]) -> StoredTensor:
    """Return edited experts as one matrix, one below the other; any other tensor as it is."""
    if len(tensor.shape) < 3:
        return tensor
    lows = ((edit.low, edit.outputs) for edit in edits if edit.low)
    stacked = any(low.experts or (outputs and len(tensor.shape) > len(low.A.shape)) for low, outputs in lows)
    stacked = stacked or (tensor.coded and len(tensor.shape) == 3)  # a row of a matrix is decoded, not an expert
    return replace(tensor, shape=(tensor.numel // tensor.shape[2], tensor.shape[2])) if stacked else tensor


def settle_widest(targets: Mapping[str, TargetTensor], changes: Sequence[Change]) -> None:
    """Tell updates that are computed with the widest of an adapter's weights how wide it is."""
    if any(change.update.widest for change in changes):
        from . import widest

        widest.settle([target.edits for target in targets.values()], changes)
