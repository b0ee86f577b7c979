"""The options that decide a plan, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import UsageError
from ..settings import chosen
from ..sizes import parse_size
from ..storage.safetensors import BITS, CONFIG_DTYPES

DTYPES = {"auto": None} | {name: dtype for dtype, name in CONFIG_DTYPES.items()}
COMPUTE_DTYPES = {"auto": "F64", "float64": "F64", "float32": "F32"}
UNDO = {"norms": "norms", "exact": "exact", "none": "none"}


@dataclass(frozen=True)
class Options:
    """What a caller may choose that changes the output."""

    dtype: str | None = None
    """The safetensors dtype of every floating tensor, or None: each keeps its own."""
    compute_dtype: str = "F64"
    max_shard_size: int | None = None
    undo: str = "norms"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_unmatched: bool = False
    ignore_field: tuple[str, ...] = ()
    """Fields of adapters' configs that are not to be refused."""

    @property
    def exact(self) -> bool:
        """Whether what rounding loses is kept, too."""
        return self.undo == "exact"

    @property
    def width(self) -> int:
        """Bytes of an element in arithmetic."""
        return BITS[self.compute_dtype] // 8

    def selects(self, module: str) -> bool:
        """Return True if --include and --exclude leave a module in."""
        included = not self.include or any(fnmatchcase(module, glob) for glob in self.include)
        return included and not any(fnmatchcase(module, glob) for glob in self.exclude)


def parse_options(
    dtype: str,
    compute_dtype: str,
    max_shard_size: str | int | None,
    undo: str,
    include: Sequence[str],
    exclude: Sequence[str],
    allow_unmatched: bool,  # noqa: FBT001 - in the order of the command line
    ignore_field: Sequence[str],
) -> Options:
    """Options as a plan has them, from their names and sizes as people write them."""
    return Options(
        dtype=chosen(dtype, DTYPES, "--dtype"),
        compute_dtype=chosen(compute_dtype, COMPUTE_DTYPES, "--compute-dtype"),
        max_shard_size=None if max_shard_size is None else parse_size(max_shard_size, "--max-shard-size"),
        undo=chosen(undo, UNDO, "--undo"),
        include=tuple(include),
        exclude=tuple(exclude),
        allow_unmatched=allow_unmatched,
        ignore_field=tuple(ignore_field),
    )


def parse_weights(given: Sequence[float], count: int) -> tuple[float, ...]:
    """One finite weight for each adapter; none at all means one each."""
    if given and len(given) != count:
        raise UsageError(f"{len(given)} --weight for {count} adapters.", hint="give one per ADAPTER, or none")
    if not all(map(math.isfinite, given)):
        raise UsageError("--weight must be a finite number.")
    return tuple(given) or (1.0,) * count
