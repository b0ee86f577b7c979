"""Compute any rows of an output tensor in float64 by definition, and the bound that an honest result keeps.

Merges are checked against this file, so it shares no code with the engine's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..adapters import Delta, LowRank
from ..engine.precision import empty, read_columns, read_rows
from ..plan.item import Edit, Item
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .stacks import CPU

if TYPE_CHECKING:
    from .coded_values import CodedValues
    from .kinds import ExpectedTransform

CHUNK_ELEMENTS = 1 << 13
"""Elements of rows that are computed together, unless more memory is free: a dozen arrays of this size are held."""
EPSILON = 2.0**-24


class EditPart(NamedTuple):
    """One edit's part in some rows."""

    delta: Tensor  # s·BA
    f: Tensor  # m/n, which broadcasts over the rows; 1 for LoRA
    size: Callable[[], Tensor]  # |s|·|B||A|, the size of the products; only a bound needs it
    terms: int  # the number of products in each sum
    n: Tensor | None = None  # the norms, which broadcast over the rows


class Block(NamedTuple):
    """Some rows of an item."""

    W: Tensor  # before any edit
    parts: list[EditPart]
    x: Tensor  # after all edits


class Expected:
    """The float64 result x of an item, for any rows, and its bound; on any device that has float64."""

    def __init__(self, item: Item, reader: Reader, device: torch.device = CPU, elements: int = CHUNK_ELEMENTS) -> None:
        self.item, self._reader, self.device, self.elements = item, reader, device, elements
        self._wholes: dict[int, Tensor] = {}  # small tensors of which rows were read, by the id of their headers
        self._coded: CodedValues | None = None
        self._set = {row: (rows.value, k) for rows in item.rows for k, row in enumerate(rows.index)}
        self._start = self._without_start()
        self._held = [self._hold(edit.low, edit) if edit.low else () for edit in item.edits]
        self._others = [self._other(edit) if edit.inner and not edit.low else None for edit in item.edits]
        self.m = [self._scales_of(k) if edit.decomposed else None for k, edit in enumerate(item.edits)]
        """For each edit, the magnitudes that it sets, 1 for outputs that it is not for; None for LoRA."""
        self._column_norms: list[Tensor | None] = []
        for k, edit in enumerate(item.edits):
            self._column_norms.append(self._measure(k) if edit.two_passes else None)

    def chunks(self, rows: Sequence[int], elements: int = 0) -> Iterator[Sequence[int]]:
        """Yield the rows in chunks of so many elements; no chunk holds rows of two experts."""
        total, columns = self.item.source.matrix
        height, part = max(1, (elements or self.elements) // max(1, columns)), max(1, total // self.item.experts)
        first = 0
        while first < len(rows):
            last = min(first + height, len(rows))
            while rows[last - 1] // part != rows[first] // part:
                last -= 1
            yield rows[first:last]
            first = last

    def block(self, rows: Sequence[int]) -> Block:
        """Return some rows before any edit, each edit's part, and x = W + Σ wᵢ·(fᵢ·(W + Δᵢ) − W)."""
        W = self.before(rows)
        parts = self._parts(W, rows)
        if len(parts) == 1 and self.item.edits[0].weight == 1:
            part = parts[0]
            return Block(W, parts, (W + part.delta) * part.f if part.f.dim() else W + part.delta)
        x = W.clone()
        for edit, part in zip(self.item.edits, parts, strict=True):
            x += edit.weight * ((W + part.delta) * part.f - W)
        return Block(W, parts, x)

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return x, and the weight that the adapter is merged into: the base's, if the base has one."""
        W, _, x = self.block(rows)
        item, base = self.item, self.item.base
        if not base or base.shape != item.stacked or base.coded:
            return x, W
        as_read = base is item.source and self._start is None and not item.rows
        return x, W if as_read else self._load(base, rows)

    def forward(self, rows: Sequence[int], block: Block, x: Tensor, *, by_columns: bool) -> Tensor:
        """Return the adapter's own outputs for inputs x; with `by_columns`, these rows' addend to all outputs."""
        from .forward import forward

        pairs, factors = zip(self.item.edits, block.parts, strict=True), partial(self.factors, rows=rows)
        return forward(block.W, pairs, factors, x, by_columns=by_columns)

    def bound(self, rows: Sequence[int], x: Tensor, *, rounded_once: bool) -> Tensor:
        """Return the largest distance from x that an honest result may have."""
        from .roundings import bound_of

        W = self.before(rows)
        return bound_of(self.item, W, self._parts(W, rows), x, start=self._start, rounded_once=rounded_once)

    def before(self, rows: Sequence[int]) -> Tensor:
        """Return the stored weight less its start, with the rows that an adapter set, before any edit."""
        old = [row for row in rows if row < self.item.matrix[0]]
        W = self._load(self.item.source, old) if self._start is None else self._start[old].double()
        W = torch.cat([W, W.new_zeros(len(rows) - len(old), W.shape[1])]) if len(old) < len(rows) else W
        for value in [trained.value for trained in self.item.rows]:
            mine = [k for k, row in enumerate(rows) if row in self._set and self._set[row][0] is value]
            if mine:
                W[mine] = self._load(value, [self._set[rows[k]][1] for k in mine])
        return W

    def _without_start(self) -> Tensor | None:
        """Return the matrix that PiSSA, OLoRA or KaSA begin with, in the stored dtype; None for others."""
        if not (low := self.item.start):
            return None
        from .starts import rest_of

        return rest_of(self._load(self.item.source), low, self.item)

    def part(self, number: int, rows: Sequence[int]) -> EditPart:
        """Return one edit's part in some rows."""
        return self._part(number, self.before(rows), rows)

    def _parts(self, W: Tensor, rows: Sequence[int]) -> list[EditPart]:
        """Return every edit's part in some rows."""
        return [self._part(number, W, rows) for number in range(len(self.item.edits))]

    def _part(self, number: int, W: Tensor, rows: Sequence[int]) -> EditPart:
        edit, m, n = self.item.edits[number], self.m[number], self._column_norms[number]
        delta, size, terms = self._difference(number, W, rows)
        if m is None:
            f = torch.ones((), dtype=torch.float64, device=self.device)
        elif edit.axis == 0:
            f = (m if n is None else m / n).view(1, -1)
        else:
            f = m[list(rows)].unsqueeze(1)
        if m is not None and edit.divides and n is None:
            n = self._row_norms(number, W + (delta if edit.norm_ratio == 1 else edit.norm_ratio * delta), rows)
            if own := edit.outputs:
                n = torch.where(torch.tensor([own[0] <= row < own[1] for row in rows], device=n.device), n, 1.0)
            n = n[:, None]
            f = f / n
        return EditPart(delta, f, size, terms, n)

    def _difference(self, number: int, W: Tensor, rows: Sequence[int]) -> tuple[Tensor, Callable[[], Tensor], int]:
        """Return V − W of one edit in some rows, the size of its numbers, and the terms of each sum."""
        edit, other = self.item.edits[number], self._others[number]
        if isinstance(edit.update, Delta):
            values = self._load(edit.update.value)
            delta = edit.update.scale * self._spread(number, values.flatten(), 0.0).view(1, -1)
            return delta, delta.abs, 1
        if edit.low:
            left, right, scale = self.factors(number, rows)
            delta = (scale * left) @ right
            return delta, lambda: abs(scale) * (left.abs() @ right.abs()), left.shape[1]
        if other:
            return other.change(W, rows, lambda: self.before(range(self.item.matrix[0])))
        return torch.zeros_like(W), lambda: torch.zeros_like(W), 1

    def _other(self, edit: Edit) -> ExpectedTransform:
        from .kinds import ExpectedTransform

        return ExpectedTransform(edit, self._load)

    def _scales_of(self, number: int) -> Tensor:
        """Return one magnitude for each row or column of the stored matrix."""
        edit = self.item.edits[number]
        assert edit.magnitudes
        m = self._load(edit.magnitudes.m).flatten() + edit.magnitudes.offset
        return self._spread(number, m.repeat_interleave(edit.kernel) if edit.kernel > 1 else m, 1.0)

    def _spread(self, number: int, values: Tensor, other: float) -> Tensor:
        """Return a number for every output of the stored weight, from those of one edit's own outputs."""
        if not (own := self.item.edits[number].outputs):
            return values
        edit, (rows, columns) = self.item.edits[number], self.item.matrix
        spread = values.new_full((columns if edit.by_columns else rows,), other)
        spread[own[0] : own[1]] = values
        return spread

    def _row_norms(self, number: int, V: Tensor, rows: Sequence[int]) -> Tensor:  # noqa: ARG002
        """Return ‖V‖ of some rows, for one edit."""
        squares: Tensor = torch.linalg.vecdot(V, V)
        return squares.sqrt()

    def _measure(self, number: int) -> Tensor:
        """Return ‖W + sBA‖ along the columns, from the whole tensor; for a bias, of its weight."""
        edit = self.item.edits[number]
        if edit.follows:
            other = Expected(edit.follows, self._reader, self.device, self.elements)
            chunks = other.chunks(range(edit.follows.matrix[0]))
            if (n := other._column_norms[0]) is not None:
                return n
            return torch.cat([torch.as_tensor(other.part(0, chunk).n).flatten() for chunk in chunks])
        squares = torch.zeros(self.item.source.matrix[1], dtype=torch.float64, device=self.device)
        for chunk in self.chunks(range(self.item.source.matrix[0])):
            W = self.before(chunk)
            V = W + edit.norm_ratio * self._difference(number, W, chunk)[0]
            squares += torch.einsum("kc,kc->c", V, V)
        squares = squares.view(-1, edit.kernel).sum(1).repeat_interleave(edit.kernel)
        first, last = edit.outputs or (0, len(squares))
        return self._spread(number, squares[first:last].sqrt(), 1.0)

    def _hold(self, low: LowRank, edit: Edit) -> tuple[Tensor, ...]:
        """Return the factors to hold: both for experts, else the one with the stored matrix's columns."""
        if low.experts:
            pair = low.A, low.B
            return tuple(read_rows(self._reader, each, range(each.matrix[0])).to(self.device) for each in pair)
        held = _dense(self._load(low.B if edit.transposed else low.A), low.blocks[1 if edit.transposed else 0])
        if low.d:
            d = self._load(low.d).flatten()
            held = held * d if edit.transposed else held * d[:, None]
        if low.b and edit.transposed:
            held = held * self._load(low.b).view(-1, 1)
        if edit.outputs and edit.transposed:
            before, after = edit.outputs[0], self.item.matrix[1] - edit.outputs[1]
            held = torch.cat([held.new_zeros(before, held.shape[1]), held, held.new_zeros(after, held.shape[1])])
        return (held,)

    def factors(self, number: int, rows: Sequence[int]) -> tuple[Tensor, Tensor, float]:
        """Return the factors of some rows of the stored matrix, (rows, r) and (r, columns), and s."""
        edit, held = self.item.edits[number], self._held[number]
        low = edit.low
        assert low
        if low.experts:
            A, B = held
            height = low.inputs[0] if edit.transposed else low.outputs
            expert, inside = rows[0] // height, [row % height for row in rows]
            A = A[expert * low.rank : (expert + 1) * low.rank].double()
            B = B[:, expert :: low.experts].double()
            return (A.T[inside], B.T, low.scale) if edit.transposed else (B[inside], A, low.scale)
        if not edit.transposed and edit.outputs:
            first, last = edit.outputs
            mine = [k for k, row in enumerate(rows) if first <= row < last]
            left = held[0].new_zeros(len(rows), len(held[0]))
            left[mine] = self._left(low, [rows[k] - first for k in mine])
            return left, held[0], low.scale
        if not edit.transposed:
            dense = _dense(self._load(low.B), low.blocks[1])[list(rows)] if low.blocks[1] > 1 else None
            return self._left(low, rows) if dense is None else dense, held[0], low.scale
        if low.blocks[0] > 1:
            left = _dense(self._load(low.A), low.blocks[0])[:, list(rows)].T
        else:
            left = read_columns(self._reader, low.A, rows).to(self.device).double().T
        return left, held[0].T, low.scale

    def _left(self, low: LowRank, rows: Sequence[int]) -> Tensor:
        """Return rows of diag(b)·B."""
        left = self._rows_of(low.B, rows)
        return left * self._load(low.b).view(-1, 1)[list(rows)] if low.b else left

    def _rows_of(self, tensor: StoredTensor, rows: Sequence[int]) -> Tensor:
        """Read rows in float64; a tensor that is no larger than a chunk's array is read once and kept."""
        if tensor.coded or tensor.nbytes > 8 * self.elements:
            return self._load(tensor, rows)
        if (whole := self._wholes.get(id(tensor))) is None:
            whole = self._wholes[id(tensor)] = read_rows(self._reader, tensor, range(tensor.matrix[0]))
        return whole[list(rows)].to(self.device).double()

    def _load(self, tensor: StoredTensor, rows: Sequence[int] | None = None) -> Tensor:
        """Read rows of a stored tensor's matrix, or all rows, in float64."""
        chosen = range(tensor.matrix[0]) if rows is None else rows
        if tensor.coded:
            return self._decoded(tensor).rows(chosen).to(self.device)
        height, filled = max(1, 4 * CHUNK_ELEMENTS // max(1, tensor.matrix[1])), 0
        if len(chosen) <= height or self.device.type != "cpu":  # a device widens numbers itself
            return read_rows(self._reader, tensor, chosen).to(self.device).double()
        small = len(chosen) * tensor.matrix[1] <= 32 * CHUNK_ELEMENTS  # the next chunk takes the same pages
        loaded = (torch.empty if small else empty)((len(chosen), tensor.matrix[1]), dtype=torch.float64)
        for start in range(0, len(chosen), height):
            part = read_rows(self._reader, tensor, chosen[start : start + height])
            loaded[filled : filled + len(part)] = part
            filled += len(part)
        return loaded.to(self.device)

    def _decoded(self, tensor: StoredTensor) -> CodedValues:
        """Return the decoder of a coded tensor, which keeps what it has read."""
        from .coded_values import CodedValues

        if self._coded is None or self._coded.tensor is not tensor:
            self._coded = CodedValues(tensor, self._reader)
        return self._coded


def _dense(stacked: Tensor, blocks: int) -> Tensor:
    """Return a block-diagonal matrix from its blocks, which lie one below the other."""
    return torch.block_diag(*stacked.chunk(blocks)) if blocks > 1 else stacked  # type: ignore[no-untyped-call]
