"""Decode quantised weights by their definitions, element by element: where its code lies, and what the code means.

The merge decodes blocks with code of its own (codecs/). From there this file takes the facts of headers, such as
bits and block sizes, and no arithmetic. A code is found by its bit in the file, a scale by its index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from ..storage.safetensors import BITS, StoredTensor
from .bit_numbers import float_value, number
from .ggml_values import GgmlRows, stored_row

FLOATS = {"F8_E4M3": (4, 3), "F8_E5M2": (5, 2), "E2M1": (2, 1)}
"""The bits of exponent and mantissa of the grids of floats."""
SMALL = 1 << 16
"""Bytes of a part that is read whole and kept."""
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
        self._held: dict[str, tuple[int, Tensor]] = {}

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
                return self._nibble_rows(scheme, row)
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
        if scheme.grid not in FLOATS:
            span, low = 2**scheme.bits - 1, 0 if scheme.grid == "unsigned" else -(2 ** (scheme.bits - 1))
            at_end = (q <= low + scheme.balanced) | (q >= low + span)
            shifted = "zero" in self._tensor.parts, "bias" in self._tensor.parts
            half += at_end * (span * 2.0**-8 * (1 + shifted[1]) + 0.5 * shifted[0] + shifted[1])
        return (q - z) * s + b, s.abs() * half

    def _block_parts(self, scheme: Blocks, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, z, s and b of W = (q − z)·s + b, with the block of rows and columns that each element lies in."""
        tensor, K = self._tensor, self._tensor.columns
        codes = tensor.parts["codes"]
        j = torch.arange(K)
        line = 8 * codes.nbytes // (tensor.numel // K)  # bits of a row of codes
        width = scheme.bits if scheme.grid in ("signed", "unsigned", "E2M1") else 8
        q = meaning(self._bits("codes", row * line + j * width, width), scheme)
        matrix, inside = row // scheme.height, row % scheme.height
        down = -(-scheme.height // scheme.rows)
        position = matrix * down + (inside // scheme.rows).clamp(max=down - 1)
        groups = tensor.parts["scale"].numel // (down * (tensor.numel // K // scheme.height))
        group = j // scheme.columns if groups > 1 else torch.zeros_like(j)
        if groups > 1 and "index" in tensor.parts:
            group = self._numbers("index", j).long().clamp(min=0)
        every = torch.arange(groups)
        at = position * groups + every
        meant = scheme.scale_bytes if tensor.parts["scale"].dtype == "U8" else None
        s = self._numbers("scale", at, meant) * scheme.factor
        if "global" in tensor.parts:
            overall = self._numbers("global", torch.zeros_like(every))
            s = s / overall if scheme.divides else s * overall
        z = b = torch.zeros(1, groups, dtype=torch.float64)
        if "zero" in tensor.parts:
            z = self._packed_zeros(scheme, row, every, groups) if scheme.packed_zeros else self._numbers("zero", at)
        if "bias" in tensor.parts:
            b = self._numbers("bias", at)
        return q, z[:, group], s[:, group], b[:, group]

    def _packed_zeros(self, scheme: Blocks, row: Tensor, group: Tensor, groups: int) -> Tensor:
        """Zero points lie along the rows: bit `row·bits` of the stream of words of each group."""
        low = row * scheme.bits
        each = [
            self._bits("zero", (low + k) // 32 * 32 * groups + (low + k) % 32 + 32 * group, 1).double() * 2**k
            for k in range(scheme.bits)
        ]
        return torch.stack(each).sum(0) - (2 ** (scheme.bits - 1) if scheme.grid == "signed" else 0)

    def _nibble_rows(self, scheme: Nibbles, row: Tensor) -> Tensor:
        """W = map[q]·absmax, over the flattened tensor; the first of two codes is in the high bits."""
        element = row * self._tensor.columns + torch.arange(self._tensor.columns)
        q = self._bits("codes", 4 * (element ^ 1), 4)
        return self._numbers("map", torch.arange(16))[q] * self._nibble_scales(scheme, element // scheme.block)

    def _nearest_nibbles(self, scheme: Nibbles, numbers: Sequence[int], x: Tensor) -> tuple[Tensor, Tensor]:
        """Return some rows, and the distance of each of x to the nearest value that its block can have."""
        table, distances = self._numbers("map", torch.arange(16)), []
        for line, row in enumerate(numbers):
            element = row * self._tensor.columns + torch.arange(self._tensor.columns)
            scale = self._nibble_scales(scheme, element // scheme.block)
            distances.append((table[:, None] * scale - x[line]).abs().amin(0))
        return self.rows(numbers), torch.stack(distances)

    def _nibble_scales(self, scheme: Nibbles, block: Tensor) -> Tensor:
        """Return the scales of blocks of the line."""
        if "nested" not in self._tensor.parts:
            return self._numbers("scale", block)
        scale = self._numbers("nested_map", torch.arange(256))[self._bits("scale", 8 * block, 8)]
        return scale * self._numbers("nested", block // scheme.nested_block) + scheme.nested_offset

    def _gptq_rows(self, scheme: Gptq, n: Tensor) -> Tensor:
        """W[n, k] = s[g, n]·(q[k, n] − z[g, n])."""
        K, N = self._tensor.columns, self._tensor.shape[0]
        k = torch.arange(K)
        g = self._numbers("index", k).long() if "index" in self._tensor.parts else k // scheme.group
        groups = torch.arange(self._tensor.parts["scale"].shape[0])
        line = 32 * self._tensor.parts["zero"].shape[1]
        q = self._streamed("codes", k * scheme.bits, scheme.bits, lambda at: at // 32 * 32 * N + 32 * n + at % 32)
        zero = self._streamed("zero", n * scheme.bits, scheme.bits, lambda at: groups * line + at)
        return self._numbers("scale", groups * N + n)[:, g] * (q - (zero[:, g] + scheme.zero))

    def _streamed(self, role: str, first: Tensor, bits: int, place: Callable[[Tensor], Tensor]) -> Tensor:
        """Return numbers whose bits are those of a stream from `first` on; `place` finds a bit of it in the part."""
        if 32 % bits == 0:  # no number lies in two words
            return self._bits(role, place(first), bits).double()
        each = (self._bits(role, place(first + bit), 1).double() * 2**bit for bit in range(bits))
        return torch.stack(tuple(each)).sum(0)

    def _awq_rows(self, scheme: Awq, n: Tensor) -> Tensor:
        """W[n, k] = s[g, n]·(q[k, n] − z[g, n]); eight outputs share a word, in an order of their own."""
        K, N = self._tensor.columns, self._tensor.shape[0]
        k = torch.arange(K)
        g = k // scheme.group
        place = torch.tensor([AWQ_ORDER.index(output) for output in range(8)])
        inside = 32 * (n // 8) + 4 * place[n % 8]
        q = self._bits("codes", 4 * k * N + inside, 4).double()
        groups = torch.arange(self._tensor.parts["scale"].shape[0])
        zero = self._bits("zero", 4 * groups * N + inside, 4).double()
        return self._numbers("scale", groups * N + n)[:, g] * (q - zero[:, g])

    def _turned_rows(self, scheme: TurnedMxfp4, row: Tensor) -> Tensor:
        """W[e, k, r] = code[e, r, k]·2^(s[e, r, k/32] − 127); the row's number is e and k."""
        expert, k = row // scheme.height, row % scheme.height
        _, R, groups, _ = self._tensor.parts["codes"].shape
        r = expert * R + torch.arange(R)
        q = float_value(torch.arange(16), exponent=2, mantissa=1)[self._bits("codes", 4 * (r * 32 * groups + k), 4)]
        return q * self._numbers("scale", r * groups + k // 32, "F8_E8M0")

    def _ggml_rows(self, scheme: Ggml, row: Tensor) -> Tensor:
        """Rows of GGUF's blocks or plain numbers, less what is added on disk."""
        K = self._tensor.columns
        if scheme.kind not in TORCH:
            return GgmlRows(scheme, row, K, self._bits).values() - scheme.added
        place = torch.arange(K) + stored_row(scheme, row) * K
        if len(self._tensor.shape) == 1:
            place = stored_row(scheme, torch.arange(K)).expand(len(row), K)
        return self._numbers("codes", place) - scheme.added

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

    def _numbers(self, role: str, index: Tensor, dtype: str | None = None) -> Tensor:
        """Return elements of a part as numbers, by their indices."""
        part = self._tensor.parts[role]
        dtype = dtype or part.dtype
        return number(self._bits(role, index.long() * BITS[part.dtype], BITS[part.dtype]), dtype)

    def _bits(self, role: str, position: Tensor, count: int) -> Tensor:
        """Return whole numbers of `count` bits, which begin at bits of a part; the low bits come first."""
        part = self._tensor.parts[role]
        lines = position.reshape(-1, position.shape[-1])
        first, last = lines.amin(1) // 8, (lines.amax(1) + count - 1) // 8 + 1
        if len(lines) > 1 and part.nbytes > SMALL and 4 * int((last - first).sum()) < int(last.max() - first.min()):
            data, start = self._gathered(part, first, last)
            byte = (lines // 8 - start[:, None]).view(position.shape)
        else:
            data, begin = self._bytes(role, part, int(first.min()), int(last.max()))
            byte = position // 8 - begin
        return _numbers_at(data, byte, position % 8, count)

    def _gathered(self, part: StoredTensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Return runs of bytes of a part, one after the other, and the number that each first byte would have."""
        lengths = last - first
        data = bytearray(int(lengths.sum()))
        runs = [(part.start + a, b - a) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
        self._reader.gather(part.path, runs, data)
        return torch.frombuffer(data, dtype=torch.uint8), first - (lengths.cumsum(0) - lengths)

    def _bytes(self, role: str, part: StoredTensor, first: int, last: int) -> tuple[Tensor, int]:
        """Return bytes of a part, and the number of the first; columns keep all bytes of one expert."""
        start, held = self._held.get(role, (0, torch.empty(0, dtype=torch.uint8)))
        if start <= first and last <= start + len(held):
            return held, start
        unit = part.nbytes // (part.shape[0] if len(part.shape) > 2 else 1)
        if 2 * (last - first) > unit or unit <= SMALL:
            first, last = first // unit * unit, -(-last // unit) * unit
        data = bytearray(last - first)
        self._reader.read(part.path, part.start + first, memoryview(data))
        self._held[role] = (first, torch.frombuffer(data, dtype=torch.uint8))
        return self._held[role][1], first


def _numbers_at(data: Tensor, byte: Tensor, bit: Tensor, count: int) -> Tensor:
    """Return numbers of `count` bits that begin at a bit of a byte."""
    value = data[byte].long()
    for k in range(1, (count + 14) // 8 if count % 8 else count // 8):
        value |= data[(byte + k).clamp(max=len(data) - 1)].long() << 8 * k
    value >>= bit
    return value & ((1 << count) - 1 if count < 64 else -1)


def meaning(codes: Tensor, scheme: Blocks) -> Tensor:
    """Return the values that codes stand for, before their scale."""
    match scheme.grid:
        case "E2M1":
            return float_value(torch.arange(16), exponent=2, mantissa=1)[codes]
        case "signed":
            return codes.double().sub(1 << scheme.bits - 1)
        case "unsigned":
            return codes.double()
    return number(codes, scheme.grid)


def half_step(v: Tensor, grid: str) -> Tensor:
    """Return half the distance between the neighbours of values, in units of their scale."""
    if grid not in FLOATS:
        return torch.full_like(v, 0.5)
    exponent, mantissa = FLOATS[grid]
    e = torch.frexp(v.clamp(min=-(2.0**900), max=2.0**900))[1].long() - 1  # 2^e ≤ |v| < 2^(e + 1)
    e = e.masked_fill(v == 0, -1000).clamp(min=2 - 2 ** (exponent - 1))
    return (e - mantissa - 1 + 1023 << 52).view(torch.float64)
