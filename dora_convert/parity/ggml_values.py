"""Decode rows of GGUF's quantised types by their definitions: for each element its bits, its scale, its least value.

codecs/gguf_blocks.py decodes whole blocks with tables of its own; nothing but names is shared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..codecs.gguf import Ggml
from .stored_bits import StoredBits, picked

FORMS = {
    "Q4_0": (32, 18, [(2, 16, 4)], -8), "Q4_1": (32, 20, [(4, 16, 4)], 0),
    "Q5_0": (32, 22, [(6, 16, 4), (2, 1, 1)], -16), "Q5_1": (32, 24, [(8, 16, 4), (4, 1, 1)], 0),
    "Q2_K": (256, 84, [(16, 32, 2)], 0), "Q3_K": (256, 110, [(32, 32, 2), (0, 32, 1)], -4),
    "Q4_K": (256, 144, [(16, 32, 4)], 0), "Q5_K": (256, 176, [(48, 32, 4), (16, 32, 1)], 0),
    "Q6_K": (256, 210, [(0, 64, 4), (128, 32, 2)], -32), "TQ2_0": (256, 66, [(0, 32, 2)], -1),
    "IQ4_NL": (32, 18, [(2, 16, 4)], 0), "IQ4_XS": (256, 136, [(8, 16, 4)], 0), "MXFP4": (32, 17, [(1, 16, 4)], 0),
    "Q8_0": (32, 34, [(2, 1, 8)], 0), "TQ1_0": (256, 54, [], -1),
}  # fmt: skip
"""By type: elements and bytes of a block; where codes begin, after how many bytes their next bits come, how many bits
they have; what is added to a code."""
TABLES = {
    "MXFP4": [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6],
    "IQ4": [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
}


EVERY = 16
"""Elements that share their scale in every type: groups have 16, 32, or more."""


def ggml_rows(scheme: Ggml, row: Tensor, columns: int, parts: StoredBits) -> Tensor:
    """Return scale·code − least for each element of rows, whose numbers stand in a column: float64 (rows, columns)."""
    elements, nbytes = FORMS[scheme.kind][:2]
    line = columns // elements * nbytes
    first = stored_row(scheme, row) * line * 8
    parts.hold("codes", first, line)
    code = GgmlElements(scheme.kind, torch.arange(columns), first, parts).code()
    groups = GgmlElements(scheme.kind, torch.arange(0, columns, EVERY), first, parts)
    scale, least = SCALES.get(scheme.kind, _plain)(groups)
    code.mul_(scale.repeat_interleave(EVERY, dim=1))
    return code - (least.repeat_interleave(EVERY, dim=1) if isinstance(least, Tensor) else least)


class GgmlElements:
    """Some elements j of each row: `at` reads bits of each element's block."""

    def __init__(self, kind: str, j: Tensor, first: Tensor, parts: StoredBits) -> None:
        self.kind, self._first, self._parts = kind, first, parts
        elements, nbytes, self.planes, self.added = FORMS[kind]
        self.e = j % elements
        self._block = j // elements * nbytes

    def at(self, byte: Tensor | int, shift: Tensor | int, count: int) -> Tensor:
        """Return `count` bits of each element's block, from a byte and a bit of it on."""
        return self._parts.whole("codes", self._first, 8 * (self._block + byte) + shift, count)

    def half(self, byte: int) -> Tensor:
        """Return the float16 of each element's block at a byte."""
        return self.at(byte, 0, 16).to(torch.int16).view(torch.float16).double()

    def signed(self, byte: Tensor | int) -> Tensor:
        """Return a signed byte of each element's block."""
        value = self.at(byte, 0, 8)
        return torch.where(value > 127, value - 256, value).double()

    def code(self) -> Tensor:
        """Return each element's code, before its scale: float64 (rows, elements)."""
        e, code, below = self.e, torch.zeros((), dtype=torch.int32), 0
        if self.kind == "Q8_0":
            return self.signed(2 + e)
        if self.kind == "TQ1_0":
            return self._digit().double() - 1
        for first, wide, count in self.planes:
            many = 8 // count  # elements of a byte
            inside = e % (wide * many)
            code = (
                code
                | self.at(first + e // (wide * many) * wide + inside % wide, inside // wide * count, count) << below
            )
            below += count
        if table := TABLES.get(self.kind[:3] if self.kind.startswith("IQ4") else self.kind):
            return picked(torch.tensor(table, dtype=torch.float64), code)
        return (code + self.added).double()

    def _digit(self) -> Tensor:
        """Five digits of base 3 lie in a byte as a fraction of 256: the k-th is ⌊3·(byte·3^k mod 256)/256⌋."""
        e = self.e
        byte = torch.where(e < 160, e % 32, torch.where(e < 240, 32 + (e - 160) % 16, 48 + (e - 240) % 4))
        k = torch.where(e < 160, e // 32, torch.where(e < 240, (e - 160) // 16, (e - 240) // 4))
        return self.at(byte, 0, 8) * 3**k % 256 * 3 // 256


def stored_row(scheme: Ggml, row: Tensor) -> Tensor:
    """Return the numbers on disk of rows; in Meta's order, the pairs of a head's two halves lie side by side."""
    if not scheme.head:
        return row
    head, inside = row // scheme.head, row % scheme.head
    part, pair = inside // (scheme.head // 2), inside % (scheme.head // 2)
    return head * scheme.head + 2 * pair + part


def _plain(row: GgmlElements) -> tuple[Tensor, Tensor | float]:
    if row.kind in ("Q4_1", "Q5_1"):
        return row.half(0), -row.half(2)
    return row.half({"TQ1_0": 52, "TQ2_0": 64}.get(row.kind, 0)), 0.0


def _q2_k(row: GgmlElements) -> tuple[Tensor, Tensor]:
    group = row.e // 16
    return row.half(80) * row.at(group, 0, 4), row.half(82) * row.at(group, 4, 4)


def _q3_k(row: GgmlElements) -> tuple[Tensor, float]:
    group = row.e // 16
    low, high = row.at(96 + group % 8, group // 8 * 4, 4), row.at(104 + group % 4, group // 4 * 2, 2)
    return row.half(108) * (low + 16 * high - 32), 0.0


def _q45_k(row: GgmlElements) -> tuple[Tensor, Tensor]:
    group = row.e // 32
    early, g = group < 4, group % 4

    def six(first: int, nibble: int) -> Tensor:
        return torch.where(early, row.at(first + g, 0, 6), row.at(12 + g, nibble, 4) + 16 * row.at(first + g, 6, 2))

    return row.half(0) * six(4, 0), row.half(2) * six(8, 4)


def _q6_k(row: GgmlElements) -> tuple[Tensor, float]:
    return row.half(208) * row.signed(192 + row.e // 16), 0.0


def _iq4_xs(row: GgmlElements) -> tuple[Tensor, float]:
    group = row.e // 32
    low, high = row.at(4 + group // 2, group % 2 * 4, 4), row.at(2 + group // 4, group % 4 * 2, 2)
    return row.half(0) * (low + 16 * high - 32), 0.0


def _mxfp4(row: GgmlElements) -> tuple[Tensor, float]:
    return torch.pow(torch.tensor(2.0, dtype=torch.float64), (row.at(0, 0, 8) - 127).double()), 0.0


SCALES: dict[str, Callable[[GgmlElements], tuple[Tensor, Tensor | float]]] = {
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q45_k, "Q5_K": _q45_k, "Q6_K": _q6_k, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
"""Scales and least values that are more than one float16 each."""
