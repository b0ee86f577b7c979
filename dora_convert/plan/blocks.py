"""Cut a matrix into blocks of rows.

Blocks depend on a tensor's shape alone: matrix products give other bits at other heights, and the bytes of an
output must not depend on the memory budget or on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_ELEMENTS = 1 << 19
"""4 MiB in float64: two workers' blocks stay in a processor's cache; double size takes 1.5 times as long."""
ROWS_MULTIPLE = 16


def block_height(rows: int, columns: int) -> int:
    """Return the rows of a block: about half a million elements, a multiple of 16 rows, at most all."""
    fitting = BLOCK_ELEMENTS // max(1, columns)
    return max(1, min(rows, max(ROWS_MULTIPLE, fitting - fitting % ROWS_MULTIPLE)))


def spans(rows: int, columns: int, parts: int = 1) -> Iterator[tuple[int, int]]:
    """Yield a matrix's blocks as half-open ranges of rows; each of `parts` equal parts has its own blocks."""
    whole = rows // parts
    height = block_height(whole, columns)
    for first in range(0, rows, whole or 1):
        for start in range(first, first + whole, height):
            yield start, min(start + height, first + whole)
