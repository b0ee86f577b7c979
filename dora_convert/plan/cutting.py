"""Cut an update of a weight of the running model into updates of the stored tensors that make the weight.

ΔW is cut by cutting its factors, so no block of ΔW is computed before its turn:

    stack of E experts           expert e has A[e·r:(e+1)·r] and B[:, e::E]
    one below the other          each tensor has its rows of B and of m: norms are per row
    part of one tensor           the factors stay whole, and the edit is for these outputs alone
    outputs in another order     the rows of B and of m are permuted

Headers alone decide. An update that cannot be cut is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..adapters import Decomposed, Delta, Full, LowRank, Rows, Transform, Update, low_rank
from ..adapters.kinds import Dense, Hadamard
from ..naming.families import TURNED_EXPERTS
from ..naming.slots import Slot
from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import FLOATS, StoredTensor
from ..storage.stored_view import view
from .shapes import Match, is_conv1d, match_shape

STACK = 3
"""Dimensions of a stack of experts' weights."""


@dataclass(frozen=True)
class Part:
    """The part of an update that is for one stored tensor."""

    name: str
    match: Match
    outputs: tuple[int, int] | None = None
    """The outputs of the stored tensor that the part is for; None for all."""


class UncutError(Exception):
    """The reason that an update cannot be cut."""


def cut(
    update: Update, slots: Sequence[Slot], base: Checkpoint, outputs: tuple[int, int] | None = None
) -> list[Part] | str:
    """Return the part of an update for each slot of its weight, or the reason that there are none.

    `outputs` are those of the weight that the update is for; None for all.
    """
    try:
        low, types = low_rank(update), base.model_types
        is_convolution = low is not None and len(low.A.shape) > 2
        slots = _within(slots, outputs, base) if outputs else slots
        weight = _measured(slots, base.tensors, stacks=not is_convolution, says_turned=bool(types & TURNED_EXPERTS))
        return [_part(update, slot, weight, base.tensors[slot.name], types) for slot in slots]
    except UncutError as error:
        return str(error)


def _within(slots: Sequence[Slot], outputs: tuple[int, int], base: Checkpoint) -> list[Slot]:
    """Return the slots, or the parts of slots, that hold some outputs of a weight, counted from the first of them."""
    if any(slot.experts or slot.order for slot in slots):
        raise UncutError(f"is for outputs {outputs[0]} to {outputs[1]} of {slots[0].name}: not done yet")
    found = []
    for slot in slots:
        shape = base.tensors[slot.name].shape
        turned = slot.transposed or (slot.transposed is None and is_conv1d(slot.name, base.model_types)) or None
        start, stop = slot.part or (0, shape[-1 if turned else 0])
        before = slot.outputs[0] if slot.outputs else 0
        first, last = max(outputs[0], before), min(outputs[1], before + stop - start)
        if first < last:
            part = (start + first - before, start + last - before)
            own = (first - outputs[0], last - outputs[0])
            found.append(
                replace(slot, outputs=own, part=part if part != (start, stop) else slot.part, transposed=turned)
            )
    if not found or sum(slot.outputs[1] - slot.outputs[0] for slot in found if slot.outputs) != outputs[1] - outputs[0]:
        raise UncutError(f"is for outputs {outputs[0]} to {outputs[1]}, which {slots[0].name} does not have")
    return found


@dataclass(frozen=True)
class ModelWeight:
    """A weight of the running model: (rows, …), or (experts, rows, columns)."""

    experts: int
    rows: int
    rest: tuple[int, ...]
    says_turned: bool
    """True if the model says of itself that its experts are stored as (in, out)."""
    title: str
    """The names of its stored tensors."""
    stacks: bool
    """True if stored tensors of three dimensions are stacks of experts, and not convolutions."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the running model."""
        return (*([self.experts] if self.experts else []), self.rows, *self.rest)


def _measured(
    slots: Sequence[Slot], tensors: Mapping[str, StoredTensor], *, stacks: bool, says_turned: bool
) -> ModelWeight:
    """Return the weight that some slots make; UncutError unless they make one whole weight."""
    title = ", ".join(slot.name for slot in slots[:3]) + (" …" if len(slots) > 3 else "")
    shapes = [_in_model(slot, tensors[slot.name].shape, stacks=stacks) for slot in slots]
    stored = shapes[0][0] if stacks and len(shapes[0]) == STACK and not slots[0].experts else 0
    axis = 1 if stored else 0
    rows = max((slot.outputs[1] for slot in slots if slot.outputs), default=shapes[0][axis])
    ends: dict[int, int] = {}
    for slot, shape in sorted(zip(slots, shapes, strict=True), key=lambda each: each[0].outputs or (0, rows)):
        first, last = slot.outputs or (0, rows)
        alike = shape[:axis] + shape[axis + 1 :] == shapes[0][:axis] + shapes[0][axis + 1 :]
        if not alike or shape[axis] != last - first or first != ends.get(slot.expert or 0, 0):
            raise UncutError(f"the base's {title} do not make one weight: {slot.name} has shape {shape}")
        ends[slot.expert or 0] = last
    if len(ends) != (slots[0].experts or 1) or set(ends.values()) != {rows}:
        raise UncutError(f"the base's {title} make no whole weight: some tensors are missing")
    return ModelWeight(slots[0].experts or stored, rows, shapes[0][axis + 1 :], says_turned, title=title, stacks=stacks)


def _in_model(slot: Slot, shape: tuple[int, ...], *, stacks: bool) -> tuple[int, ...]:
    """Return the shape that a slot has in the running model."""
    if slot.transposed and len(shape) > 1:
        shape = (*shape[:-2], shape[-1], shape[-2])
    if not slot.part:
        return shape
    return (slot.part[1] - slot.part[0], *shape[2 if stacks and len(shape) == STACK else 1 :])


def _part(update: Update, slot: Slot, weight: ModelWeight, stored: StoredTensor, model_types: frozenset[str]) -> Part:
    """Return the part of an update for one slot, matched with the slot's tensor."""
    outputs, shape = slot.part, stored.shape
    match update:
        case Full():
            update, outputs = _cut_value(update, slot, weight, shape), None
        case Delta(value):
            _refuse_shape(value, weight)
            update = replace(update, value=view(value, rows=_rows(slot, weight)))
        case _:
            update = _cut_factors(update, slot, weight)
    if slot.part and outputs:
        if len(shape) == STACK and weight.stacks and (weight.says_turned or slot.transposed):
            raise UncutError(f"is for one expert, and {slot.name} holds all experts as (in, out): not done yet")
        shape = _in_model(slot, shape, stacks=weight.stacks)
        shape = shape[::-1] if slot.transposed else shape
    match = match_shape(update, slot.name, shape, stored.dtype, model_types)
    if isinstance(match, str):
        raise UncutError(match)
    return Part(slot.name, match, outputs)


def _rows(slot: Slot, weight: ModelWeight) -> Sequence[int] | None:
    """Return the outputs of the weight that a slot holds, in the order of the disk; None for all as they are."""
    first, last = slot.outputs or (0, weight.rows)
    if slot.order is not None:
        if sorted(slot.order) != list(range(last - first)):
            raise UncutError(f"the order of rows in {slot.name} is none of its {last - first} rows")
        return tuple(first + each for each in slot.order)
    return range(first, last) if slot.outputs else None


def _cut_factors(update: Update, slot: Slot, weight: ModelWeight) -> Update:
    """Return an update without the outputs that a slot does not hold."""
    rows = _rows(slot, weight)
    match update:
        case _ if weight.experts:
            return _of_experts(update, slot, weight)
        case LowRank():
            return _cut_low_rank(update, slot, weight)
        case Decomposed() if update.axis == "columns" and slot.part:
            raise UncutError(
                f"has magnitudes by columns, for {slot.part[1] - slot.part[0]} outputs of {slot.name} alone"
            )
        case Decomposed(inner, m) if update.axis == "rows" or update.normalised or not slot.outputs:
            m = _elements(m, rows) if update.axis == "rows" else m
            changed = _cut_factors(inner, slot, weight) if inner else None
            return replace(update, inner=changed if isinstance(changed, Transform) else None, m=m)
        case Decomposed():
            raise UncutError(f"its magnitudes are norms over all of {weight.title}, which are stored apart")
        case Hadamard(one=LowRank() as one, other=LowRank() as other) if not slot.transposed:
            parts = [replace(each, B=view(each.B, rows=rows)) for each in (one, other)]
            return replace(update, one=parts[0], other=parts[1])
        case Dense(value) if not slot.transposed:
            return replace(update, value=view(value, rows=rows))
    raise UncutError(f"is {update.title}, which is not cut yet, and its weight is stored as {weight.title}")


def _cut_low_rank(low: LowRank, slot: Slot, weight: ModelWeight) -> LowRank:
    """Return factors without the outputs that a slot does not hold."""
    rows = _rows(slot, weight)
    if low.outputs != weight.rows:
        raise UncutError(f"its lora_B is for {low.outputs} outputs; {weight.title} have {weight.rows}")
    if low.start:
        raise UncutError(f"{low.start.value} began with a weight that is stored otherwise than the model has it")
    if low.transposed:
        raise UncutError(f"is for an embedding, and {weight.title} is not stored as one")
    if rows is not None and low.blocks[1] != 1:
        raise UncutError(f"its lora_B is block-diagonal, and its weight is stored in parts: {weight.title}")
    turned = low.transposed if slot.transposed is None else slot.transposed
    return replace(low, B=view(low.B, rows=rows), b=low.b and _elements(low.b, rows), transposed=turned)


def _elements(vector: StoredTensor, rows: Sequence[int] | None) -> StoredTensor:
    """Return some elements of a magnitude or a diagonal, of whatever shape."""
    if rows is None:
        return vector
    return view(vector if len(vector.shape) == 1 else replace(vector, shape=(vector.numel,)), rows=rows)


def _of_experts(update: Update, slot: Slot, weight: ModelWeight) -> LowRank:
    """Return the factors of one expert, or of all experts that a tensor holds."""
    if not isinstance(update, LowRank) or update.start or update.d or update.b or update.blocks != (1, 1):
        raise UncutError("only plain LoRA is trained on experts")
    count, r, sizes = weight.experts, update.rank, (weight.rows, *weight.rest)
    straight = (update.outputs, *update.inputs) == sizes
    turned = (*update.inputs, update.outputs) == sizes
    if max(1, update.experts) != count or not (straight or turned):
        factors = f"lora_A {update.A.shape} and lora_B {update.B.shape}"
        raise UncutError(f"{factors} do not make {count} experts of shape {sizes}: {weight.title}")
    if straight and turned:
        turned = update.square[0 if weight.says_turned else 1]
    of_A = None if slot.expert is None else range(slot.expert * r, (slot.expert + 1) * r)
    of_B = None if slot.expert is None else range(slot.expert, r * count, count)
    rows = _rows(slot, weight)
    A, B = view(update.A, of_A, rows if turned else None), view(update.B, None if turned else rows, of_B)
    experts = update.experts if slot.expert is None else 0
    return replace(update, A=A, B=B, experts=experts, transposed=turned != bool(slot.transposed))


def _cut_value(update: Full, slot: Slot, weight: ModelWeight, shape: tuple[int, ...]) -> Update:
    """Return the part of a tensor saved whole that belongs into a slot."""
    value, rows = update.value, _rows(slot, weight)
    _refuse_shape(value, weight)
    if value.dtype not in FLOATS or (weight.experts and not slot.experts and not slot.transposed and rows is not None):
        raise UncutError(f"is saved whole as {value.dtype}, and its weight is stored as {weight.title}: not cut yet")
    if slot.experts:
        assert slot.expert is not None
        first = slot.expert * weight.rows
        value = replace(value, shape=(weight.experts * weight.rows, *weight.rest))
        rows = range(first, first + weight.rows) if rows is None else [first + row for row in rows]
    value = view(value, rows=rows, turned=bool(slot.transposed) and len(value.shape) > 1)
    if not slot.part:
        return replace(update, value=value)
    if slot.transposed or len(shape) != 2 or update.start:
        raise UncutError(f"is saved whole, and is part of {slot.name}, which is {shape}: not done yet")
    return Rows(value, tuple(range(*slot.part)))


def _refuse_shape(value: StoredTensor, weight: ModelWeight) -> None:
    if value.shape != weight.shape:
        raise UncutError(f"has shape {value.shape}; {weight.title} make {weight.shape}")
