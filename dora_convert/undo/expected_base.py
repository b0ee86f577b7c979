"""Check a recovered tensor of the base against the inverse of the definition, in float64."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..engine.precision import half_ulp
from ..errors import MalformedError
from ..output.finished import TensorResult, Verdict
from ..parity.expected import EPSILON, Block, Expected
from ..parity.self_check import SelfCheck
from ..plan.item import Item
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor


def replaced_rows(item: Item, reader: Reader) -> dict[int, tuple[StoredTensor, int]]:
    """Return the stored tensor and row that hold each replaced row of the base.

    The undo record holds the rows that differ from the adapter's; the adapter holds the other rows.
    """
    replaced = {row: (rows.value, k) for rows in item.rows for k, row in enumerate(rows.index)}
    if item.undo and item.undo.kept:
        values, index = item.undo.kept
        data = bytearray(index.nbytes)
        reader.read(index.path, index.start, memoryview(data))
        numbers = struct.unpack(f"<{index.numel}q", data)
        first, last = (item.source.matrix[0], item.base.matrix[0]) if item.base else (0, 0)
        complete = last - first <= len(numbers) and {*range(first, last)} <= {*numbers}
        if not complete or not all(0 <= number < max(first, last) for number in numbers):
            raise MalformedError(f"{index.path}: {index.name} names other rows than were kept.")
        replaced |= {row: (values, k) for k, row in enumerate(numbers)}
    return replaced


class ExpectedBase(Expected):
    """The float64 W of an item that is recovered from W', for any rows."""

    def __init__(self, item: Item, reader: Reader) -> None:
        assert item.undo
        self._undo = item.undo
        self._replaced = replaced_rows(item, reader)
        own = item.undo.original
        self._original = Expected(replace(item, source=own, base=own, undo=None), reader) if own else None
        super().__init__(item, reader)

    def block(self, rows: Sequence[int]) -> Block:
        """Return some rows as merged, each edit's part, and W = (W' − Σ wᵢ·fᵢ·Δᵢ)/(1 + Σ wᵢ·(fᵢ − 1))."""
        merged = self.before(rows)
        parts = self._parts(merged, rows)
        x = merged.clone()
        other = self._others[0] if len(parts) == 1 else None
        if other and self.item.edits[0].depends and other.depends:
            x = other.back(merged / parts[0].f, rows, self._whole_unscaled)
        else:
            for edit, part in zip(self.item.edits, parts, strict=True):
                x -= edit.weight * part.f * part.delta
            x = (x / self._share(rows)).nan_to_num(0.0, 0.0, 0.0)
        if self._undo.taken:
            left, right = self._undo.taken
            x += torch.einsum("kr,rc->kc", self._load(left, rows), self._load(right))
        return Block(merged, parts, self._replaced_in(x, rows))

    def _replaced_in(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """Put the base's replaced rows into some rows, and return these."""
        for k, row in enumerate(rows):
            if row in self._replaced:
                stored, number = self._replaced[row]
                x[k] = self._load(stored, [number])[0]
        return x

    def _whole_unscaled(self) -> Tensor:
        """Return all rows of the merged tensor, without the magnitudes."""
        merged = self.before(range(self.item.matrix[0]))
        return merged if self.m[0] is None else merged / self._scales()

    def _scales(self) -> Tensor:
        """Return m/n of the one edit for the whole tensor, or m."""
        edit, m = self.item.edits[0], self.m[0]
        assert m is not None
        n = self._norms(0) if edit.divides else torch.ones_like(m)
        return (m / n).unsqueeze(edit.axis)

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return W and W'."""
        block = self.block(rows)
        return block.x, block.W

    def bound(self, rows: Sequence[int], x: Tensor, *, rounded_once: bool) -> Tensor:  # noqa: ARG002 - always is
        """Return the largest honest distance from x: one rounding, through the inverse."""
        merged, share = self.before(rows), self._share(rows)
        slack: Tensor = (x.shape[1] ** 0.5 + 6) * EPSILON * (x.abs() + (merged / share).abs())
        for edit, part in zip(self.item.edits, self._parts(merged, rows), strict=True):
            slack += (edit.weight * part.f / share).abs() * (part.terms + 2) * EPSILON * part.size()
        return half_ulp(x, self.item.dtype) + slack.nan_to_num(0.0, 0.0, 0.0)

    def before(self, rows: Sequence[int]) -> Tensor:
        """Return rows of the merged tensor, or of the tensor that replaced the base's."""
        return self._load(self.item.source, rows)

    def _share(self, rows: Sequence[int]) -> Tensor:
        """Return 1 + Σ wᵢ·(fᵢ − 1): the factor of W in W'."""
        total = torch.ones((), dtype=torch.float64)
        for edit, part in zip(self.item.edits, self._parts(self.before(rows), rows), strict=True):
            share: Tensor = edit.weight * (part.f - 1)
            total = torch.add(total, share)
        return total

    def _without_start(self) -> None:
        return None

    def _row_norms(self, number: int, V: Tensor, rows: Sequence[int]) -> Tensor:  # noqa: ARG002
        return self._norms(number, rows) if self._original else self._norms(number)[list(rows)]

    def _measure(self, number: int) -> Tensor:
        return self._norms(number)

    def _norms(self, number: int, rows: Sequence[int] = (0,)) -> Tensor:
        """Return the norms of one edit: measured on the base's own tensor, or as recorded."""
        stored = self._undo.norms[number]
        if stored:
            return self._spread(number, self._load(stored).flatten(), 1.0)
        n = self._original and self._original.part(number, rows).n
        assert isinstance(n, Tensor)
        return n.flatten()


class ChainExpectedBase(ExpectedBase):
    """The float64 W of an item that is recovered from a chain's W'."""

    def block(self, rows: Sequence[int]) -> Block:
        """Return some rows as merged, each link's part, and W: each link solved for what came before it."""
        merged = x = self.before(rows)
        parts = self._parts(merged, rows)
        for edit, part in reversed(list(zip(self.item.edits, parts, strict=True))):
            share = 1 + edit.weight * (part.f - 1)
            x = ((x - edit.weight * part.f * part.delta) / share).nan_to_num(0.0, 0.0, 0.0)
        return Block(merged, parts, self._replaced_in(x, rows))

    def bound(self, rows: Sequence[int], x: Tensor, *, rounded_once: bool) -> Tensor:  # noqa: ARG002 - always is
        """Return the largest honest distance from x: one rounding, through each link's inverse."""
        value = self.before(rows)
        slack = torch.zeros_like(value)
        for edit, part in reversed(list(zip(self.item.edits, self._parts(value, rows), strict=True))):
            share = 1 + edit.weight * (part.f - 1)
            slack = slack + abs(edit.weight) * part.f.abs() * (part.terms + 2) * EPSILON * part.size()
            value = value - edit.weight * part.f * part.delta
            slack = ((slack + (x.shape[1] ** 0.5 + 6) * EPSILON * value.abs()) / share.abs()).nan_to_num(0.0, 0.0, 0.0)
            value = value / share
        return half_ulp(x, self.item.dtype) + slack


class RecoveryCheck(SelfCheck):
    """Compares recovered tensors with the base's, as far as the undo record tells them."""

    def check_all(
        self, finished: Sequence[tuple[Item, TensorResult]], device: torch.device | None = None
    ) -> list[Verdict]:
        """Check items one by one: the merge's definitions are not theirs."""
        return [self.check(item, result, device) for item, result in finished]

    def _compare(self, item: Item, written: StoredTensor, result: TensorResult, device: torch.device) -> Verdict:
        """Compare a sample of rows; read a tensor that is recovered bit for bit back whole."""
        if item.undo and item.undo.ulps:
            same = self._reader.digest(written).fast == result.written_hash
            return Verdict(written.numel, 0 if same else written.numel)
        return super()._compare(item, written, result, device)

    def _expected(self, item: Item, result: TensorResult, device: torch.device) -> Expected:
        """Return the definition of a recovered tensor, on the host: the record lies there."""
        del result, device
        if not item.combination:
            return ExpectedBase(item, self._reader)
        return ChainExpectedBase(item, self._reader)
