"""How tensors are cut into blocks of rows, and what working on one of them costs in memory.

Blocks depend on a tensor's shape alone: matrix products give other bits at other heights, and the bytes of
an output must not depend on the memory budget or on how many workers there are.
"""

from __future__ import annotations

from collections.abc import Iterator

from .stored import Stored

BLOCK_ELEMENTS = 1 << 19
"""4 MiB in float64: two workers' blocks stay in a processor's cache, twice the size takes half as long again."""
ROWS_MULTIPLE = 16


def block_height(tensor: Stored) -> int:
    """Rows of one block: about half a million elements, a multiple of 16 rows, at most all rows."""
    rows, columns = tensor.matrix
    fitting = BLOCK_ELEMENTS // max(1, columns)
    return max(1, min(rows, max(ROWS_MULTIPLE, fitting - fitting % ROWS_MULTIPLE)))


def spans(tensor: Stored) -> Iterator[tuple[int, int]]:
    """The blocks of a tensor as half-open ranges of rows."""
    rows, height = tensor.matrix[0], block_height(tensor)
    for start in range(0, rows, height):
        yield start, min(start + height, rows)
