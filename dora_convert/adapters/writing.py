"""Help formats to write: refuse what a format cannot hold, fold scalings, and bring all factors to one rank.

A writer only names tensors. A `ShapedTensor` says how one is made of a stored tensor; `fitting/run.py` makes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import Fault, UnsupportedError
from ..storage.safetensors import StoredTensor
from ..storage.stored_view import view
from . import Change, Decomposed, Delta, LowRank, Rows, Update
from .new_adapter import NewAdapter, ShapedTensor

HINT = "dora-convert to-lora BASE ADAPTER OUT makes a LoRA of anything"


@dataclass(frozen=True)
class RowFactors:
    """A change that is a LoRA or a DoRA by rows, and its parts."""

    change: Change
    low: LowRank
    m: StoredTensor | None
    kernel: tuple[int, ...] = ()
    """The dimensions of a convolution's kernel that both factors lack, as those of a 1×1 convolution may."""

    @property
    def module(self) -> str:
        """The module."""
        return self.change.module


def factors_of(new: NewAdapter, format_name: str, *, dora: bool = True, embeddings: bool = False) -> list[RowFactors]:
    """Return the factors of all changes; UnsupportedError names every change that the format cannot hold."""
    faults = [
        Fault(change.target, why)
        for change in new.changes
        if (why := _objection(change, dora=dora, embeddings=embeddings))
    ]
    if faults or not new.changes:
        raise UnsupportedError(f"{format_name} cannot hold {len(faults)} changes.", faults=faults, hint=HINT)
    found = [RowFactors(change, *_parts(change.update), _kernel(change, new)) for change in new.changes]
    kinds = {bool(each.m) for each in found}
    if len(kinds) > 1 and format_name in ("mlx", "torchtune"):
        raise UnsupportedError(f"{format_name} cannot hold LoRA and DoRA in one adapter.", hint=HINT)
    return found


def _parts(update: Update) -> tuple[LowRank, StoredTensor | None]:
    low = update.inner if isinstance(update, Decomposed) else update
    assert isinstance(low, LowRank)
    return low, update.m if isinstance(update, Decomposed) else None


def _kernel(change: Change, new: NewAdapter) -> tuple[int, ...]:
    """Return the dimensions of a point convolution's kernel, which only the base shows; () for all other weights."""
    weight, (low, _) = new.model and new.model.tensors.get(change.target), _parts(change.update)
    return weight.shape[2:] if weight and len(low.A.shape) == 2 and set(weight.shape[2:]) == {1} else ()


def _objection(change: Change, *, dora: bool, embeddings: bool) -> str | None:
    """Return why a change is neither a LoRA nor a DoRA that other tools read; None if it is."""
    update, low = change.update, change.update
    if isinstance(update, Decomposed):
        low = update.inner  # type: ignore[assignment] # checked below
        if not dora:
            return "is a DoRA, which this format does not have"
        if update.axis != "rows" or update.normalised or update.offset:
            return f"has magnitudes of another kind: {update.title}"
        if update.norm_scale is not None and isinstance(low, LowRank) and update.norm_scale != low.scale:
            return "has a norm without the scaling, as the adapters library has"
    if not isinstance(low, LowRank):
        return f"is {update.title}"
    if low.d or low.b or low.blocks != (1, 1) or low.experts or low.start or change.outputs:
        return f"is more than two factors: {low.title}"
    return "is an embedding" if low.transposed and not embeddings else None


def refuse_others(new: NewAdapter, format_name: str) -> None:
    """Raise UnsupportedError for changes that PEFT's own writer does not know."""
    parts = [Fault(change.target, "is in a component of a pipeline") for change in new.changes if "/" in change.target]
    if parts:
        hint = "--to diffusers holds all components in one file"
        raise UnsupportedError(f"{format_name} holds one model, not a pipeline.", faults=parts, hint=hint)
    faults = [
        Fault(change.target, why)
        for change in new.changes
        if not isinstance(change.update, Delta | Rows)
        and change.target not in new.parameters
        and type(change.update).__name__ != "Full"
        and (why := _objection(change, dora=True, embeddings=True))
        and not (new.like and new.like.format == format_name)
    ]
    if faults:
        raise UnsupportedError(f"{format_name} cannot hold {len(faults)} changes.", faults=faults, hint=HINT)


def one_scale(found: Sequence[RowFactors]) -> tuple[int, float, bool]:
    """Return one rank and one scaling for all factors, and True if scalings are folded into B."""
    ranks, scales = {each.low.rank for each in found}, {each.low.scale for each in found}
    rank = max(ranks)
    same = len(scales) == 1
    return rank, scales.pop() if same else 1.0, not same


def shaped(tensor: StoredTensor, shape: Sequence[int], scale: float = 1.0) -> ShapedTensor:
    """Return a tensor times a number, in a larger shape; in its own dtype if the number is 1."""
    return ShapedTensor(tensor, tuple(shape), scale, tensor.dtype if scale == 1 else "F32")


def number(value: float) -> ShapedTensor:
    """Return a single number as a tensor."""
    return ShapedTensor(None, (), value)


def matrices(low: LowRank) -> tuple[StoredTensor, StoredTensor]:
    """Return A (r, in) and B (out, r) of the weight as (out, in): an embedding's factors change places."""
    if not low.transposed:
        return low.A, low.B
    return view(low.B, turned=True), view(low.A, turned=True)


def layers_of(modules: Sequence[str], pattern: str = r"(.*?layers)\.(\d+)\.(.+)") -> dict[int, set[str]]:
    """Return the names inside each layer; UnsupportedError for modules outside of layers."""
    layers: dict[int, set[str]] = {}
    for module in modules:
        if not (match := re.fullmatch(pattern, module)):
            raise UnsupportedError(f"{module} is outside of the layers, which the format cannot say.", hint=HINT)
        layers.setdefault(int(match[2]), set()).add(match[3])
    return layers
