"""Hold the options that decide a plan, and parse them as a caller writes them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..adapters.adapter import Waived
from ..errors import UsageError
from ..settings import parse_size
from ..storage.safetensors import BITS, CONFIG_DTYPES

DTYPES = {"auto": None} | {name: dtype for dtype, name in CONFIG_DTYPES.items()}
COMPUTE_DTYPES = {"auto": "F64", "float64": "F64", "float32": "F32"}


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
    legacy_config: bool = False
    """True if config.json gets the fields of transformers 4, too."""
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
        included = not self.include or any(_matches(module, glob) for glob in self.include)
        return included and not any(_matches(module, glob) for glob in self.exclude)

    def check_globs(self, modules: Collection[str]) -> Iterator[str]:
        """Yield a warning for each --exclude that matches no module; raise UsageError for such an --include."""
        for option, globs in (("--include", self.include), ("--exclude", self.exclude)):
            for glob in globs:
                if any(_matches(module, glob) for module in modules):
                    continue
                kinds = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", module) for module in sorted(modules))
                shown = ", ".join(f"{kind} ({count})" for kind, count in [*kinds.items()][:20])
                text = f"{option} {glob} matches no module"
                if option == "--include":
                    raise UsageError(f"{text}. The modules are {shown}.")
                yield f"{text}; the modules are {shown}"


def _matches(module: str, glob: str) -> bool:
    """Return True if a glob matches a module's name; a name without wildcards matches the ends of names, too."""
    if any(wildcard in glob for wildcard in "*?["):
        return fnmatchcase(module, glob)
    return f".{module}".endswith(f".{glob}")


def parse_options(given: Mapping[str, Any]) -> Options:
    """Return a plan's options from those of a verb, which may lack some; UsageError for an invalid size."""
    size = given.get("max_shard_size")
    return Options(
        dtype=DTYPES[given.get("dtype", "auto")],
        compute_dtype=COMPUTE_DTYPES[given.get("compute_dtype", "auto")],
        max_shard_size=None if size is None else parse_size(size, "--max-shard-size"),
        undo=given.get("undo") or "none",
        include=given.get("include", ()),
        exclude=given.get("exclude", ()),
        allow_unmatched=given.get("allow_unmatched", False),
        ignore_field=given.get("ignore_field", ()),
        ignore_file=given.get("ignore_file", ()),
        strict=given.get("strict", False),
        legacy_config=given.get("legacy_config", False),
    )


def parse_weights(given: Sequence[float] | float, count: int) -> tuple[float, ...]:
    """Return one finite weight for each adapter; no weights at all means 1 for each."""
    weights = tuple(given) if isinstance(given, Sequence) else (given,)
    if weights and len(weights) != count:
        raise UsageError(f"{len(weights)} --weight for {count} adapters.", hint="give one per ADAPTER, or none")
    if not all(map(math.isfinite, weights)):
        raise UsageError("--weight must be a finite number.")
    return weights or (1.0,) * count
