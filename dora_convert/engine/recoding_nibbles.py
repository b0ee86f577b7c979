"""Code a merged weight in nf4 or fp4 again: blocks of one line, the nearest value of the table, new scales.

The offset and the tables of double quantisation stay the base's. Scales are coded first, and then values by the scales
as they will be decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..codecs.bitsandbytes import Nibbles
from ..codecs.coded import CodedTensor, as_bytes_of
from ..codecs.codes import NearestCodes
from ..codecs.numbers import by_groups, picked, values
from ..storage.reader import spans
from .decoding import StoredParts


def nibble_blocks(
    tensor: CodedTensor,
    merged: Callable[[int, int], Tensor],
    parts: StoredParts,
    refuse: Callable[[Sequence[Tensor]], None],
) -> Iterator[dict[str, Tensor]]:
    """Yield the bytes of codes and scales, by role, block of rows after block; `merged` returns rows in float64.

    `refuse` raises an error for scales that are Inf.
    """
    scheme = tensor.scheme
    assert isinstance(scheme, Nibbles)
    coder, scale_coder, nested = NearestCodes(_table(tensor, "map", parts)), None, "nested" in tensor.parts
    if nested:
        table = _table(tensor, "nested_map", parts)
        scale_coder = table, NearestCodes(table)
    together = scheme.block * (scheme.nested_block if nested else 1)
    step = together // math.gcd(tensor.columns, together)
    for start, stop in spans(tensor.shape[0], tensor.columns, step=step):
        line = merged(start, stop).flatten()
        scales, pieces = _scales(scheme, _largest(line, scheme.block), scale_coder)
        refuse([scales])
        codes = _nearest(line, scales, coder, scheme.block)
        two = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(torch.int16)
        yield {"codes": (two << 4).bitwise_or_(two >> 8).to(torch.uint8), **pieces}


def _table(tensor: CodedTensor, role: str, parts: StoredParts) -> Tensor:
    part = tensor.parts[role]
    return values(parts.rows(as_bytes_of(part, 1), 0, 1), part.dtype).flatten()


def _largest(line: Tensor, block: int) -> Tensor:
    """Return the largest magnitude of each block of a line."""
    rest = -len(line) % block
    blocks = (torch.nn.functional.pad(line, (0, rest)) if rest else line).view(-1, block)
    return blocks.amax(1).maximum(-blocks.amin(1))


def _scales(
    scheme: Nibbles, absmax: Tensor, coder: tuple[Tensor, NearestCodes] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return scales as they will be decoded, and the bytes of the parts that hold them.

    `coder` holds the values of codes of scales, and finds these codes, if scales are coded, too.
    """
    if not coder:
        stored = absmax.float()
        return stored.double(), {"scale": stored.view(torch.uint8)}
    (table, nearest), offset = coder, scheme.nested_offset
    outer = _largest(absmax - offset, scheme.nested_block).float()
    codes = _nearest(absmax - offset, outer.double(), nearest, scheme.nested_block)
    scales = picked(table, codes) * outer.double().repeat_interleave(scheme.nested_block)[: len(codes)] + offset
    return scales, {"scale": codes, "nested": outer.view(torch.uint8)}


def _nearest(line: Tensor, scales: Tensor, nearest: NearestCodes, block: int) -> Tensor:
    """Return the codes of the nearest values, each block by its scale: uint8; the line is overwritten."""
    by_groups(line[None], scales[None], block, Tensor.div_)
    if bool((scales == 0).any()):
        line.nan_to_num_(0.0)
    return nearest(line)
