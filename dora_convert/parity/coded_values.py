"""Decode quantised weights by their definitions, element by element: where its code lies, and what the code means.

The merge decodes blocks with code of its own (codecs/). From there this file takes the facts of headers, such as
bits and block sizes, and no arithmetic. A code is found by its bit in the file, a scale by its index.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codecs.as_trained import AsTrained
from ..codecs.awq import Awq
from ..codecs.bitsandbytes import Nibbles
from ..codecs.blocks import Blocks
from ..codecs.coded import CodedTensor
from ..codecs.gguf import Ggml
from ..codecs.gpt_oss import TurnedMxfp4
from ..codecs.gptq import Gptq
from ..engine.precision import TORCH
from ..storage.reader import Reader
from ..storage.safetensors import StoredTensor
from .bit_numbers import SMALL_FLOATS, number, table_of
from .ggml_values import ggml_rows, stored_row
from .stored_bits import START, StoredBits, picked, spread

TOGETHER = 1 << 15
"""Elements that are decoded together."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output of each place in a word."""


class CodedValues:
    """The float64 values of one coded tensor, for any rows of its last dimension."""

    def __init__(self, tensor: StoredTensor, reader: Reader) -> None:
        assert isinstance(tensor, CodedTensor)
        self.tensor = self._tensor = tensor
        self._reader = reader
        self._trained: Tensor | None = None
        self._parts = StoredBits(tensor, reader)

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """Return some rows of the tensor's matrix: (rows, columns)."""
        wide = self._tensor.matrix[1] // max(1, self._tensor.columns)
        lines = torch.tensor([number * wide + k for number in numbers for k in range(wide)])
        height = max(1, TOGETHER // max(1, self._tensor.columns))
        pieces = [self._rows(lines[k : k + height, None]) for k in range(0, len(lines), height)]
        return torch.cat(pieces).view(len(numbers), -1)

    def _rows(self, row: Tensor) -> Tensor:
        """Return the rows whose numbers stand in a column: (rows, columns)."""
        match self._tensor.scheme:
            case Blocks() as scheme:
                q, z, s, b = self._block_parts(scheme, row)
                return (q - z) * s + b
            case Nibbles() as scheme:
                return self._nibble_values(row) * self._nibble_scales(scheme, row)  # over the flattened tensor
            case Gptq() as scheme:
                return self._gptq_rows(scheme, row)
            case Awq() as scheme:
                return self._awq_rows(scheme, row)
            case TurnedMxfp4() as scheme:
                return self._turned_rows(scheme, row)
            case Ggml() as scheme:
                return self._ggml_rows(scheme, row)
            case AsTrained() as scheme:
                self._trained = self._as_trained(scheme) if self._trained is None else self._trained
                return self._trained[row.flatten()].double()
        raise AssertionError(f"{self._tensor.scheme.title} has no second decoder")

    def with_steps(self, numbers: Sequence[int], x: Tensor) -> tuple[Tensor, Tensor]:
        """Return some rows, and half the distance between the neighbours that values x have among a block's codes.

        At the ends of a range it is more: the stored scale, zero point and bias are rounded themselves.
        """
        scheme, x = self._tensor.scheme, x.cpu()
        if isinstance(scheme, Nibbles):
            return self._nearest_nibbles(scheme, numbers, x)
        assert isinstance(scheme, Blocks)
        q, z, s, b = self._block_parts(scheme, torch.tensor(numbers)[:, None])
        v = (x - b) / s
        half = half_step(v, scheme.grid)
        if scheme.grid == "E2M1" and scheme.scale_bytes == "F8_E4M3":  # few bits of a scale hold values this small
            half += (v.abs() > 6) * 6 * half_step(s, "F8_E4M3") / s
        if scheme.grid not in SMALL_FLOATS:
            span, low = 2**scheme.bits - 1, 0 if scheme.grid == "unsigned" else -(2 ** (scheme.bits - 1))
            at_end = (q <= low + scheme.balanced) | (q >= low + span)
            shifted = "zero" in self._tensor.parts, "bias" in self._tensor.parts
            half.masked_fill_(at_end, 0.5 + span * 2.0**-8 * (1 + shifted[1]) + 0.5 * shifted[0] + shifted[1])
        return (q - z) * s + b, s.abs() * half

    def _block_parts(self, scheme: Blocks, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, z, s and b of W = (q − z)·s + b, with the block of rows and columns that each element lies in."""
        tensor, parts, K = self._tensor, self._tensor.parts, self._tensor.columns
        j = torch.arange(K)
        line = 8 * parts["codes"].nbytes // (tensor.numel // K)  # bits of a row of codes
        width = scheme.bits if scheme.grid in ("signed", "unsigned", "E2M1") else 8
        q = meaning(self._parts.whole("codes", row * line, j * width, width), scheme)
        down = -(-scheme.height // scheme.rows)
        position = row // scheme.height * down + (row % scheme.height // scheme.rows).clamp(max=down - 1)
        groups = parts["scale"].numel // (down * (tensor.numel // K // scheme.height))
        group: Tensor | int = scheme.columns
        if groups > 1 and "index" in parts:
            group = self._parts.numbers("index", START, j).long().clamp(min=0).flatten()
        every, first = torch.arange(groups), position * groups
        meant = scheme.scale_bytes if parts["scale"].dtype == "U8" else None
        s = self._parts.numbers("scale", first, every, meant) * scheme.factor
        if "global" in parts:
            overall = self._parts.numbers("global", START, torch.zeros_like(every))
            s = s / overall if scheme.divides else s * overall
        z = b = torch.zeros(1, 1, dtype=torch.float64)
        if "zero" in parts:
            packed = scheme.packed_zeros
            z = self._packed_zeros(scheme, row, every) if packed else self._parts.numbers("zero", first, every)
        if "bias" in parts:
            b = self._parts.numbers("bias", first, every)
        return q, spread(z, group, K), spread(s, group, K), spread(b, group, K)

    def _packed_zeros(self, scheme: Blocks, row: Tensor, group: Tensor) -> Tensor:
        """Zero points lie along the rows: bit `row·bits` of the stream of words of each group."""
        low, groups = row * scheme.bits, len(group)
        each = [
            self._parts.whole("zero", (low + k) // 32 * 32 * groups + (low + k) % 32, 32 * group, 1).double() * 2**k
            for k in range(scheme.bits)
        ]
        return torch.stack(each).sum(0) - (2 ** (scheme.bits - 1) if scheme.grid == "signed" else 0)

    def _nibble_values(self, row: Tensor) -> Tensor:
        """Return the values of codes before their scale, map[q]; the first of two codes is in the high bits."""
        K, j = self._tensor.columns, torch.arange(self._tensor.columns)
        if K % 2:  # a row may begin within a byte
            q = self._parts.whole("codes", START, 4 * (row * K + j ^ 1), 4)
        else:
            q = self._parts.whole("codes", row * K * 4, 4 * (j ^ 1), 4)
        return picked(self._parts.numbers("map", START, torch.arange(16)).flatten(), q)

    def _nearest_nibbles(self, scheme: Nibbles, numbers: Sequence[int], x: Tensor) -> tuple[Tensor, Tensor]:
        """Return some rows, and the distance of each of x to the nearest value that its block can have."""
        row, v = torch.tensor(numbers)[:, None], torch.empty_like(x)
        values, scale = self._parts.numbers("map", START, torch.arange(16)).flatten(), self._nibble_scales(scheme, row)
        nearest = torch.full_like(x, torch.inf)
        for value in values.tolist():
            torch.minimum(nearest, torch.mul(scale.expand_as(x), value, out=v).sub_(x).abs_(), out=nearest)
        return self._nibble_values(row) * scale, nearest

    def _nibble_scales(self, scheme: Nibbles, row: Tensor) -> Tensor:
        """Return the scale of each element of some rows; blocks do not begin anew with each row."""
        K = self._tensor.columns
        if K % scheme.block:
            return self._block_scales(scheme, START, (row * K + torch.arange(K)) // scheme.block)
        scales = self._block_scales(scheme, row * (K // scheme.block), torch.arange(K // scheme.block))
        return spread(scales, scheme.block, K)

    def _block_scales(self, scheme: Nibbles, first: Tensor, inside: Tensor) -> Tensor:
        """Return the scales of blocks of the line."""
        if "nested" not in self._tensor.parts:
            return self._parts.numbers("scale", first, inside)
        table = self._parts.numbers("nested_map", START, torch.arange(256)).flatten()
        scale = picked(table, self._parts.whole("scale", 8 * first, 8 * inside, 8))
        nested = self._parts.numbers("nested", START, (first + inside) // scheme.nested_block)
        return scale * nested + scheme.nested_offset

    def _gptq_rows(self, scheme: Gptq, n: Tensor) -> Tensor:
        """W[n, k] = s[g, n]·(q[k, n] − z[g, n])."""
        K, N, bits = self._tensor.columns, self._tensor.shape[0], scheme.bits
        k = torch.arange(K)
        g: Tensor | int = scheme.group
        if "index" in self._tensor.parts:
            g = self._parts.numbers("index", START, k).long().flatten()
        groups = torch.arange(self._tensor.parts["scale"].shape[0])
        line = 32 * self._tensor.parts["zero"].shape[1]
        q, zero = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        step = bits if 32 % bits == 0 else 1  # a number may lie in two words
        for bit in range(0, bits, step):
            at = k * bits + bit
            q = q + self._parts.whole("codes", 32 * n, at // 32 * 32 * N + at % 32, step).double() * 2**bit
            zero = zero + self._parts.whole("zero", n * bits + bit, groups * line, step).double() * 2**bit
        scale = self._parts.numbers("scale", n, groups * N)
        return spread(scale, g, K) * (q - spread(zero + scheme.zero, g, K))

    def _awq_rows(self, scheme: Awq, n: Tensor) -> Tensor:
        """W[n, k] = s[g, n]·(q[k, n] − z[g, n]); eight outputs share a word, in an order of their own."""
        K, N = self._tensor.columns, self._tensor.shape[0]
        k = torch.arange(K)
        place = torch.tensor([AWQ_ORDER.index(output) for output in range(8)])
        first = 32 * (n // 8) + 4 * place[n % 8]
        q = self._parts.whole("codes", first, 4 * k * N, 4).double()
        groups = torch.arange(self._tensor.parts["scale"].shape[0])
        zero = self._parts.whole("zero", first, 4 * groups * N, 4).double()
        scale = self._parts.numbers("scale", n, groups * N)
        return spread(scale, scheme.group, K) * (q - spread(zero, scheme.group, K))

    def _turned_rows(self, scheme: TurnedMxfp4, row: Tensor) -> Tensor:
        """W[e, k, r] = code[e, r, k]·2^(s[e, r, k/32] − 127); the row's number is e and k."""
        expert, k = row // scheme.height, row % scheme.height
        _, R, groups, _ = self._tensor.parts["codes"].shape
        first, r = expert * R, torch.arange(R)
        q = self._parts.whole("codes", 4 * (first * 32 * groups + k), 4 * r * 32 * groups, 4)
        scale = self._parts.numbers("scale", first * groups + k // 32, r * groups, "F8_E8M0")
        return picked(table_of("E2M1"), q) * scale

    def _ggml_rows(self, scheme: Ggml, row: Tensor) -> Tensor:
        """Rows of GGUF's blocks or plain numbers, less what is added on disk."""
        K = self._tensor.columns
        if scheme.kind not in TORCH:
            return ggml_rows(scheme, row, K, self._parts) - scheme.added
        first, inside = stored_row(scheme, row) * K, torch.arange(K)
        if len(self._tensor.shape) == 1:
            first, inside = row * K, stored_row(scheme, inside)
        return self._parts.numbers("codes", first, inside) - scheme.added

    def _as_trained(self, scheme: AsTrained) -> Tensor:
        """Return the whole weight as bitsandbytes itself quantises and decodes it, in float32.

        Its rows are one line then: on a CPU, its blocks would begin anew with each row else.
        """
        from bitsandbytes import functional

        part = self._tensor.parts["codes"]
        data = bytearray(part.nbytes)
        self._reader.read(part.path, part.start, memoryview(data))
        W = torch.frombuffer(data, dtype=TORCH[part.dtype])
        if scheme.kind == "int8":
            q, absmax, _ = functional.int8_vectorwise_quant(W.view(part.shape).half())
            whole: Tensor = q.float() * absmax.float()[:, None] / 127
            return whole
        kind, _, double = scheme.kind.partition("-")
        line = (W.float() if part.dtype == "F64" else W).view(1, -1)
        packed, state = functional.quantize_4bit(line, blocksize=64, compress_statistics=bool(double), quant_type=kind)
        state.dtype = torch.float32
        decoded: Tensor = functional.dequantize_4bit(packed, state)
        return decoded.view(part.shape)


def meaning(codes: Tensor, scheme: Blocks) -> Tensor:
    """Return the values that codes stand for, before their scale."""
    match scheme.grid:
        case "E2M1":
            return picked(table_of("E2M1"), codes)
        case "signed":
            return codes.double().sub(1 << scheme.bits - 1)
        case "unsigned":
            return codes.double()
    return number(codes, scheme.grid)


def half_step(v: Tensor, grid: str) -> Tensor:
    """Return half the distance between the neighbours of values, in units of their scale."""
    if grid not in SMALL_FLOATS:
        return torch.full_like(v, 0.5)
    exponent, mantissa = SMALL_FLOATS[grid]
    power = v.view(torch.int64).bitwise_and(0x7FF << 52).view(torch.float64)  # 2^e ≤ |v| < 2^(e + 1)
    return power.clamp_(2.0 ** (2 - 2 ** (exponent - 1)), 2.0**900).mul_(2.0 ** (-mantissa - 1))
