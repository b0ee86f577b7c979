"""Compute the change ΔW of one edit, as those who combine changes need it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from ..adapters import Full
from ..errors import NumericalError
from ..maths import combine as maths
from ..plan.item import Edit, Item
from .device_buffers import DeviceBuffers
from .factors import LoadedEdit

GOLDEN = (5**0.5 - 1) / 2


@dataclass
class LoadedValues(LoadedEdit):
    """An edit whose result is stored whole: a saved module, or a fine-tuned checkpoint's tensor."""

    buffers: DeviceBuffers | None = None

    def change_(self, out: Tensor, W: Tensor, start: int, stop: int) -> None:
        """Compute value − W."""
        assert self.buffers
        assert isinstance(self.edit.update, Full)
        out.copy_(self.buffers.raw(self.edit.update.value, start, stop, "factor")).sub_(W)


def load_edit(edit: Edit, buffers: DeviceBuffers) -> LoadedEdit:
    """Read the tensors that every block of one edit needs."""
    return LoadedValues(edit, buffers=buffers) if isinstance(edit.update, Full) else LoadedEdit.load(edit, buffers)


def forget_norms(operands: Iterable[LoadedEdit]) -> None:
    """Remove the norms of rows that a pass has computed; the last pass computes them again."""
    for operand in operands:
        if not operand.edit.two_passes:
            operand.n.clear()


def scattered(item: Item) -> Iterator[tuple[int, int]]:
    """Yield the blocks of rows from all parts of the tensor in turn."""
    spans = list(item.spans())
    return (spans[k] for k in sorted(range(len(spans)), key=lambda k: k * GOLDEN % 1))


def refuse_infinite(operand: LoadedEdit, item: Item) -> None:
    """Raise NumericalError if the last norms of an edit are not finite."""
    if not operand.is_finite():
        raise NumericalError(
            f"{item.name}: a change of it is NaN or infinite.",
            hint="is this the base that the adapters were trained on?",
        )


def change_of(operand: LoadedEdit, W: Tensor, start: int, stop: int, *, out: Tensor) -> Tensor:
    """Compute ΔW = apply(W) − W of one edit for a block."""
    if isinstance(operand, LoadedValues):
        operand.change_(out, W, start, stop)
    elif not operand.edit.depends:
        operand.add_(out.zero_(), start, stop)
    else:
        operand.apply_(out.copy_(W), start, stop).sub_(W)
    return out


def wanted_rank(edit: Edit, item: Item) -> tuple[int, int] | None:
    """Return k and n: an edit keeps the k largest of n elements; None if it keeps all."""
    count = own_elements(edit, item)
    return (maths.kept_count(edit.density, count), count) if edit.density < 1 else None


def own_elements(edit: Edit, item: Item) -> int:
    """Return the number of elements that an edit may change: PEFT prunes a module's own change."""
    rows, columns = item.matrix
    if not edit.outputs:
        return rows * columns
    count = edit.outputs[1] - edit.outputs[0]
    return count * (rows if edit.by_columns else columns)
