"""Show part of a stored matrix as a tensor of its own: rows and columns in any order, and turned if need be.

A factor may lie transposed in its file (MLX), strided (the experts' B), cut (qkv) or permuted (rotary rows). A
view of it is a `StoredTensor` for everything that reads tensors, and no bytes are copied.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from ..records import record
from .safetensors import StoredTensor

_CODES: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""Codes of Python's arrays for elements of so many bytes."""


@record(frozen=True, slots=True)
class StoredView(StoredTensor):
    """Rows and columns of a stored tensor, which is seen as a matrix: the first dimension by all others.

    A vector is seen as one column, so `rows` are its elements. `name`, `path` and `start` are the whole's.
    """

    whole: StoredTensor
    rows: Sequence[int]
    """The whole's rows, in the order of the view."""
    columns: Sequence[int]
    """The whole's columns, in the order of the view."""
    turned: bool
    """True if the whole's columns are shown as rows."""

    is_view: ClassVar[bool] = True

    @property
    def matrix_behind(self) -> StoredTensor:
        """The whole as the matrix that `rows` and `columns` count in."""
        return replace(self.whole, shape=_grid(self.whole))

    @property
    def kept(self) -> int:
        """Bytes of the whole if a reader should keep it: if some of the columns are shown, or all of them as rows."""
        rows, columns = _grid(self.whole)
        in_rows = not self.turned and self.columns == range(columns)
        return 0 if in_rows or rows == 1 or columns == 1 else self.whole.nbytes

    def picked(self, rows: Sequence[int], columns: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """Return the whole's rows and columns behind some rows and columns of this tensor's matrix."""
        if self.turned or len(self.shape) < 2:
            rows, columns = columns, rows
        return _at(self.rows, rows), _at(self.columns, columns)


def view(
    whole: StoredTensor,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
    *,
    turned: bool = False,
) -> StoredTensor:
    """Return rows and columns of a tensor's matrix, by default all of them; `turned` shows them transposed.

    The whole may be a view itself. All rows and columns, not turned, are the tensor itself.
    """
    height, width = _grid(whole)
    rows, columns = range(height) if rows is None else rows, range(width) if columns is None else columns
    if not turned and (rows, columns) == (range(height), range(width)):
        return whole
    if not all(0 <= each < height for each in _ends(rows)) or not all(0 <= each < width for each in _ends(columns)):
        raise ValueError(f"{whole.name} has {height} rows and {width} columns: others cannot be shown")
    shape = _shape(whole, rows, columns, turned=turned)
    if isinstance(whole, StoredView):
        rows, columns = (columns, rows) if whole.turned else (rows, columns)
        turned = turned != whole.turned
        rows, columns, whole = _at(whole.rows, rows), _at(whole.columns, columns), whole.whole
    start, path = whole.start, whole.path
    return StoredView(
        whole.name, whole.dtype, shape, path, start, whole=whole, rows=rows, columns=columns, turned=turned
    )


def _shape(whole: StoredTensor, rows: Sequence[int], columns: Sequence[int], *, turned: bool) -> tuple[int, ...]:
    if len(whole.shape) < 2 and not turned:
        return (len(rows),)
    if not turned and columns == range(whole.matrix[1]):
        return (len(rows), *whole.shape[1:])
    return (len(columns), len(rows)) if turned else (len(rows), len(columns))


def _ends(numbers: Sequence[int]) -> Sequence[int]:
    return (numbers[0], numbers[-1]) if isinstance(numbers, range) and numbers else tuple(numbers)


def _at(numbers: Sequence[int], chosen: Sequence[int]) -> Sequence[int]:
    """Return the chosen ones of some numbers; a range if both are ranges."""
    if isinstance(numbers, range) and isinstance(chosen, range) and chosen.step > 0:
        return numbers[chosen.start : chosen.stop : chosen.step]
    return tuple(numbers[each] for each in chosen)


def _grid(whole: StoredTensor) -> tuple[int, int]:
    return whole.matrix if len(whole.shape) > 1 else (whole.numel, 1)


def describe_view(tensor: StoredTensor) -> list[Any]:
    """Return what tells a view from others of the same tensor, as JSON."""
    if not isinstance(tensor, StoredView):
        return []
    ranges = [
        [each.start, each.stop, each.step] if isinstance(each, range) else list(each)
        for each in (tensor.rows, tensor.columns)
    ]
    return [list(tensor.shape), *ranges, tensor.turned]


def lines_of(tensor: StoredTensor, data: memoryview) -> Iterator[memoryview]:
    """Yield a view's bytes, row by row, from the bytes of the whole tensor."""
    assert isinstance(tensor, StoredView)
    code = _CODES[tensor.itemsize]
    every, stride = data.cast(code), tensor.matrix_behind.shape[1]
    turned = tensor.turned or len(tensor.shape) < 2
    lines, elements = (tensor.columns, tensor.rows) if turned else (tensor.rows, tensor.columns)
    far, near = (1, stride) if turned else (stride, 1)
    for line in lines:
        if isinstance(elements, range):
            first, last = (line * far + each * near for each in (elements.start, elements.stop))
            yield memoryview(every[first : last : elements.step * near].tobytes())
        else:
            yield memoryview(array(code, [every[line * far + each * near] for each in elements])).cast("B")


def whole_of(tensor: StoredTensor) -> StoredTensor:
    """Return the tensor behind a view; any other tensor itself."""
    return tensor.whole if isinstance(tensor, StoredView) else tensor


def shown_rows(tensor: StoredTensor) -> Sequence[int]:
    """Return the rows, or columns, of the tensor behind a view that the view shows as its rows."""
    if isinstance(tensor, StoredView):
        return tensor.columns if tensor.turned else tensor.rows
    return range(tensor.shape[0])


def run_of(tensor: StoredTensor) -> tuple[int, int] | None:
    """Return the first byte and the number of bytes of a view whose elements lie one after the other."""
    assert isinstance(tensor, StoredView)
    rows, width = tensor.rows, tensor.matrix_behind.shape[1]
    in_order = isinstance(rows, range) and rows.step == 1 and not tensor.turned and tensor.columns == range(width)
    return (tensor.start + rows[0] * width * tensor.itemsize, tensor.nbytes) if in_order and rows else None
