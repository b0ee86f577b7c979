"""Hold the options that decide a plan, and parse them as a caller writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..adapters.adapter import Waived
from ..errors import UsageError
from ..settings import parse_choice
from ..sizes import parse_size
from ..storage.safetensors import BITS, CONFIG_DTYPES

DTYPES = {"auto": None} | {name: dtype for dtype, name in CONFIG_DTYPES.items()}
COMPUTE_DTYPES = {"auto": "F64", "float64": "F64", "float32": "F32"}
UNDO = {"norms": "norms", "exact": "exact", "none": "none"}


@dataclass(frozen=True)
class Options:
    """The choices of a caller that change the output."""

    dtype: str | None = None
    """The safetensors dtype of every floating tensor; None keeps each tensor's own."""
    compute_dtype: str = "F64"
    max_shard_size: int | None = None
    undo: str = "norms"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_unmatched: bool = False
    ignore_field: tuple[str, ...] = ()
    """Fields of adapters' configs that are accepted although this version refuses them."""
    ignore_file: tuple[str, ...] = ()
    """Weight files beside adapters that are left out."""
    strict: bool = False
    """True if an adapter must hold all that its config says was trained."""

    @property
    def waived(self) -> Waived:
        """The parts of adapters that the caller does without."""
        return Waived(self.ignore_field, self.ignore_file)

    @property
    def exact(self) -> bool:
        """True if the undo record holds even what rounding loses."""
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
    *,
    dtype: str = "auto",
    compute_dtype: str = "auto",
    max_shard_size: str | int | None = None,
    undo: str = "none",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unmatched: bool = False,
    ignore_field: Sequence[str] = (),
    ignore_file: Sequence[str] = (),
    strict: bool = False,
) -> Options:
    """Return a plan's options from names and sizes as a caller writes them; UsageError for an invalid one."""
    return Options(
        dtype=parse_choice(dtype, DTYPES, "--dtype"),
        compute_dtype=parse_choice(compute_dtype, COMPUTE_DTYPES, "--compute-dtype"),
        max_shard_size=None if max_shard_size is None else parse_size(max_shard_size, "--max-shard-size"),
        undo=parse_choice(undo, UNDO, "--undo"),
        include=tuple(include),
        exclude=tuple(exclude),
        allow_unmatched=allow_unmatched,
        ignore_field=tuple(ignore_field),
        ignore_file=(ignore_file,) if isinstance(ignore_file, str) else tuple(ignore_file),
        strict=strict,
    )


def parse_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """Return one finite weight for each adapter; no weights at all means 1 for each."""
    if weights and len(weights) != count:
        raise UsageError(f"{len(weights)} --weight for {count} adapters.", hint="give one per ADAPTER, or none")
    if not all(map(math.isfinite, weights)):
        raise UsageError("--weight must be a finite number.")
    return tuple(weights) or (1.0,) * count
