"""Compute combined changes by definition, for any rows: pruned, drawn at random, elected, added."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from ..adapters import Full
from ..engine.precision import half_ulp
from ..plan.item import Edit, Item
from ..storage.reader import Reader
from .chain import ChainExpected, outputs_of
from .expected import EPSILON, Block, EditPart, Expected
from .stacks import CPU
from .thresholds import Cut, find_cut

PASS_ELEMENTS = 1 << 17
"""Elements of rows that a search for a threshold looks at together."""
SPREAD = 0.15
ALL_BITS = (1 << 64) - 1
FEW_ELEMENTS = 1 << 18
"""Tensors up to this size have their thresholds searched, whatever a merge says of them."""
SIGMAS = 5.0


def expected_of(item: Item, reader: Reader, device: torch.device = CPU, *, cuts: Sequence[Cut] = ()) -> Expected:
    """Return the definition of an item's result.

    `cuts` are thresholds that a merge claims. They are believed for large tensors, until `misled` tells otherwise.
    """
    if not item.combination:
        return Expected(item, reader, device)
    if item.combination.method == "chain":
        return ChainExpected(item, reader, device)
    return CombinedExpected(item, reader, device, cuts if item.source.numel > FEW_ELEMENTS else ())


def misled(expected: Expected) -> bool:
    """Return True if the rows that were looked at deny thresholds that a merge claims."""
    return isinstance(expected, CombinedExpected) and expected.doubts()


class Kept(NamedTuple):
    """One change after it was pruned or drawn."""

    delta: Tensor  # what is kept
    change: Tensor  # all of it
    scale: Tensor | float  # the factor of what is kept
    slack: Tensor
    doubtful: Tensor  # True if rounding decides to keep an element


class CombinedExpected(Expected):
    """Changes of the unmerged W that are pruned, drawn at random or elected, and added."""

    def __init__(self, item: Item, reader: Reader, device: torch.device = CPU, cuts: Sequence[Cut] = ()) -> None:
        assert item.combination
        self._how = item.combination
        super().__init__(item, reader, device)
        self.cuts: Sequence[Cut] = ()
        """The threshold of each change; empty if the method has none."""
        self._shares: list[list[Tensor]] | None = [[] for _ in item.edits] if cuts else None
        """The share of each row that was kept of each change, if a merge claims the thresholds."""
        if self._how.prunes:
            self.cuts = cuts or [self._search(number) for number in range(len(item.edits))]

    def doubts(self) -> bool:
        """Return True if the rows so far keep another share of a change than its density, beyond chance."""
        for edit, rows in zip(self.item.edits, self._shares or (), strict=bool(self._shares)):
            own = torch.cat(rows).double()
            error = float(own.std()) / len(own) ** 0.5
            distance = abs(float(own.mean()) - edit.density)
            if edit.outputs is None and distance > SIGMAS * error + 2 / self.item.matrix[1]:
                return True
        return False

    def block(self, rows: Sequence[int]) -> Block:
        """Return some rows before any edit, each edit's part, and the combined result."""
        W = self.before(rows)
        parts = self._parts(W, rows)
        kept = [self._keep(number, part, W, rows).delta for number, part in enumerate(parts)]
        weights = [edit.weight for edit in self.item.edits]
        if not self._how.elects:
            return Block(W, parts, W + sum(w * delta for w, delta in zip(weights, kept, strict=True)))
        stacked = torch.stack(kept)
        agreeing = stacked.sign() == self._elected(stacked)
        weighted = torch.tensor(weights, dtype=W.dtype, device=W.device)[:, None, None] * stacked
        mean = (agreeing * weighted).sum(0) / agreeing.sum(0).clamp(min=1)
        return Block(W, parts, W + mean)

    def bound(self, rows: Sequence[int], x: Tensor, *, rounded_once: bool) -> Tensor:
        """Return the largest distance from x; all of a change, if rounding decides to keep it or to elect its sign."""
        W, dtype = self.before(rows), self.item.dtype
        kept = []
        for number, part in enumerate(self._parts(W, rows)):
            slack = part.f.abs() * (part.terms + 2) * EPSILON * (part.size() + W.abs())
            if not rounded_once:
                slack = slack + part.f.abs() * half_ulp(part.delta, dtype) + half_ulp(W, dtype)
            kept.append(self._keep(number, part, W, rows, slack))
        tolerance = half_ulp(x, dtype) + (math.sqrt(W.shape[1]) + 6) * EPSILON * x.abs()
        doubtful = torch.stack([each.doubtful for each in kept]).any(dim=0)
        if self._how.elects:
            doubtful = doubtful | self._close_vote(kept)
        for edit, each in zip(self.item.edits, kept, strict=True):
            whole = torch.where(doubtful, each.change.abs(), 0.0)
            tolerance += abs(edit.weight) * (each.slack + whole) * each.scale
        return tolerance

    def forward(self, rows: Sequence[int], block: Block, x: Tensor, *, by_columns: bool) -> Tensor:  # noqa: ARG002
        """Return the outputs of the combined weight: no adapter has a forward of its own for them."""
        return outputs_of(block, x, by_columns=by_columns)

    def _difference(self, number: int, W: Tensor, rows: Sequence[int]) -> tuple[Tensor, Callable[[], Tensor], int]:
        update = self.item.edits[number].update
        if not isinstance(update, Full):
            return super()._difference(number, W, rows)
        value = self._load(update.value, rows)
        return value - W, value.abs, 1

    def _change(self, number: int, W: Tensor, rows: Sequence[int]) -> Tensor:
        """Return ΔW of one edit."""
        return _change_of(self._part(number, W, rows), W)

    def _keep(self, number: int, part: EditPart, W: Tensor, rows: Sequence[int], slack: Tensor | None = None) -> Kept:
        """Return what the method keeps of one change."""
        change, edit = _change_of(part, W), self.item.edits[number]
        if self._how.prunes:
            return self._prune(number, change, rows, slack)
        slack = torch.zeros_like(change) if slack is None else slack
        certain = torch.zeros_like(change, dtype=torch.bool)
        if not self._how.draws or edit.density >= 1:
            return Kept(change, change, 1.0, slack, certain)
        p = _rank_shares(change, edit.density) if self._how.method == "della" else torch.full_like(change, edit.density)
        drawn = self._bits(number, rows) < torch.round(p * 2.0**32)
        return Kept(torch.where(drawn, change / p, 0.0), change, 1 / p, slack, certain)

    def _prune(self, number: int, change: Tensor, rows: Sequence[int], slack: Tensor | None) -> Kept:
        """Return what pruning keeps of one change; without slack no element is in doubt."""
        (least, last), columns, size = self.cuts[number], self.item.matrix[1], change.abs()
        nothing = torch.zeros((), dtype=torch.bool, device=size.device)
        doubtful = nothing if slack is None else (size - least).abs() <= slack
        if last >= 0:
            places = torch.tensor(list(rows), device=size.device)[:, None] * columns
            late = places + torch.arange(columns, device=size.device) > last
            size = size.masked_fill_(late & (size == least), -1.0)
        mask = size.ge_(least)  # one for what is kept, else zero
        if slack is None and self._shares:
            self._shares[number].append(mask.mean(dim=1).cpu())
        return Kept(mask.mul_(change), change, 1.0, nothing if slack is None else slack, doubtful)

    def _bits(self, number: int, rows: Sequence[int]) -> Tensor:
        """Return the random bits of one edit's rows, as numbers from 0 to 2³² − 1."""
        key = xxhash.xxh3_64(f"{self._how.seed}/{number}/{self.item.name}".encode()).intdigest()
        columns = torch.arange(self.item.matrix[1], device=self.device)
        lines = []
        for row in rows:
            mixed = _splitmix(key + 0x9E3779B97F4A7C15 * (row + 1))
            mixed_column = _lowbias(columns ^ (mixed & 0xFFFFFFFF))
            lines.append(_lowbias(mixed_column ^ (mixed >> 32)))
        words = torch.stack(lines)
        return (words + (1 << 31)) % (1 << 32)  # as signed numbers are ordered

    def _elected(self, stacked: Tensor) -> Tensor:
        """Return the majority's sign of each element, 1 or −1."""
        votes = stacked if self._how.majority_sign == "total" else stacked.sign()
        return votes.sum(0).ge_(0.0).mul_(2.0).sub_(1.0)

    def _close_vote(self, kept: Sequence[Kept]) -> Tensor:
        """Return True for elements whose elected sign rounding may turn."""
        stacked = torch.stack([each.delta for each in kept])
        slack = torch.stack([torch.as_tensor(each.slack * each.scale) for each in kept])
        if self._how.majority_sign == "total":
            close = stacked.sum(0).abs() <= slack.sum(0)
        else:
            close = ((stacked.abs() <= slack) & (stacked != 0)).any(dim=0)
        return close & (stacked != 0).any(dim=0)

    def _search(self, number: int) -> Cut:
        """Find the threshold of one change in the whole tensor."""
        edit = self.item.edits[number]
        if edit.density >= 1:
            return 0.0, -1
        wanted = int(edit.density * _own_elements(edit, self.item))
        return find_cut(partial(self._magnitudes, number), wanted)

    def _magnitudes(self, number: int, own: bool) -> Iterator[tuple[int, Tensor]]:  # noqa: FBT001
        """Yield the flat place and the magnitudes of all elements; with `own`, only of outputs that it is for."""
        edit, (height, columns) = self.item.edits[number], self.item.matrix
        for rows in self.chunks(range(height), PASS_ELEMENTS):
            change = self._change(number, self.before(rows), rows).abs()
            if own and edit.outputs:
                first, last = edit.outputs
                inside = [k for k, row in enumerate(rows) if first <= row < last]
                change = change[:, first:last] if edit.by_columns else change[inside]
            if change.numel():
                yield rows[0] * columns, change.flatten().cpu()


def _change_of(part: EditPart, W: Tensor) -> Tensor:
    """Return ΔW: s·BA for LoRA, without W in it."""
    return (W + part.delta) * part.f - W if part.f.dim() else part.delta.expand_as(W)


def _own_elements(edit: Edit, item: Item) -> int:
    """Return the number of elements of the module that an edit is for."""
    height, width = item.matrix
    if not edit.outputs:
        return height * width
    return (edit.outputs[1] - edit.outputs[0]) * (height if edit.by_columns else width)


def _rank_shares(change: Tensor, density: float) -> Tensor:
    """Return DELLA's probabilities: linear in the rank of the magnitude within a row, equal ones by column."""
    spread = min(SPREAD, density / 2, 1 - density)
    ranks = change.abs().sort(dim=1, stable=True).indices.argsort(dim=1).double()
    if change.shape[1] == 1:
        return torch.full_like(change, density)
    return density - spread + 2 * spread * ranks / (change.shape[1] - 1)


def _splitmix(number: int) -> int:
    """Return splitmix64's finaliser (Steele, Lea and Flood, 2014)."""
    z = number & ALL_BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ALL_BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ALL_BITS
    return z ^ (z >> 31)


def _lowbias(x: Tensor) -> Tensor:
    """Return a 32-bit mix of numbers from 0 to 2³² − 1, which int64 holds without overflow into the sign."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
