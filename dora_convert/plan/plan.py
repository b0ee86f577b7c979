"""Hold a plan: every output tensor exactly once, and the fate of every adapter tensor.

A plan is data. `planner.make_plan` builds a plan from headers and options, `engine.run` carries it out,
reports print it.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from ..adapters import Adapter, Waived
from ..errors import UsageError
from ..option_table import SUM, Combination
from ..settings import NO_FACTS, AdapterFacts, parse_facts, parse_size
from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import BITS, CONFIG_DTYPES, StoredTensor
from .alike import kind_of
from .item import Item


@dataclass(frozen=True)
class OutputShard:
    """One output file: its name, header metadata and tensors in order."""

    filename: str
    metadata: Mapping[str, str]
    items: tuple[Item, ...]

    @property
    def prefix(self) -> str:
        """The beginning of names that the file's own names lack: the component of a pipeline."""
        return self.filename[: self.filename.rfind("/") + 1]

    @property
    def inputs(self) -> Mapping[Path, None]:
        """The files that the shard's tensors are computed from, each once."""
        items = (*self.items, *(edit.follows for item in self.items for edit in item.edits if edit.follows))
        return dict.fromkeys(
            path
            for item in items
            for source in (item.source, item.base, *(item.undo.tensors if item.undo else ()))
            if source
            for path in source.paths
        )


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One line of the ledger: an adapter tensor, its fate, the output tensors that contain it, and why."""

    tensor: str
    fate: str  # merged | replaced | added | ignored | unmatched | missing
    into: tuple[str, ...] = ()
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as reports and receipts hold it."""
        return {"tensor": self.tensor, "fate": self.fate, "into": list(self.into), "why": self.why}


@dataclass(frozen=True)
class Plan:
    """Every decision that a run needs."""

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    options: Options
    shards: tuple[OutputShard, ...]
    index_name: str | None
    ledger: tuple[Entry, ...]
    config: Mapping[str, Any] | None = None
    """The output's config, if it differs from the base's."""
    warnings: tuple[str, ...] = ()
    """Decisions that a user should know of."""
    files: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    """JSON files beside the weights that change: their contents, or None for those that are left out."""

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """Every output tensor, shard after shard."""
        return tuple(item for shard in self.shards for item in shard.items)

    @cached_property
    def bytes_out(self) -> int:
        """Bytes of all output tensors."""
        return sum(item.nbytes for item in self.items)

    @cached_property
    def _kinds(self) -> Sequence[Sequence[Item]]:
        """The items by kind: but for what recovers the base, those of one kind cost the same."""
        kinds: dict[object, list[Item]] = defaultdict(list)
        for item in self.items:
            kinds[kind_of(item) or item.name].append(item)
        return tuple(kinds.values())

    @cached_property
    def memory(self) -> int:
        """Bytes that a worker holds for the costliest item: the least memory budget."""
        return max(max(map(self.cost, items if self.options.exact else items[:1])) for items in self._kinds)

    def cost(self, item: Item) -> int:
        """Return the bytes that a worker holds for one item."""
        return item.cost(self.options.width, exact=self.options.exact and self.remembers(item))

    @cached_property
    def undo_bytes(self) -> int:
        """About the most bytes that the undo record's tensors take."""
        if self.options.undo == "none":
            return 0
        if self.options.exact:
            kept = sum(item.undo_bytes(exact=self.remembers(item)) for item in self.items)
        else:
            kept = sum(len(items) * items[0].undo_bytes() for items in self._kinds)
        return kept + sum(tensor.nbytes for tensor in self.lost)

    @cached_property
    def remains(self) -> Mapping[str, Item]:
        """The output tensor that recovers each base tensor, by the base tensor's name on disk."""
        remains: dict[str, Item] = {}
        for item in sorted(self.items, key=lambda item: (not (item.verbatim or item.extends), item.added)):
            lost = item.replaced and item.verbatim  # an adapter's counter instead of the base's
            if item.base and not (lost or item.base.coded or item.part_of):
                remains.setdefault(item.origin, item)
        return remains

    @cached_property
    def lost(self) -> tuple[StoredTensor, ...]:
        """The base's tensors that only the undo record holds: layers left out, counters replaced."""
        if self.options.undo == "none":
            return ()
        return tuple(tensor for name, tensor in self.base.tensors.items() if name not in self.remains)

    @cached_property
    def lost_with(self) -> Mapping[str, str]:
        """The shard that each lost tensor is read with: the first that reads the same file, else the last."""
        first = {path: shard.filename for shard in reversed(self.shards) for path in shard.inputs}
        return {tensor.name: first.get(tensor.path, self.shards[-1].filename) for tensor in self.lost}

    def remembers(self, item: Item) -> bool:
        """Return True if the undo record can recover a tensor of the base from this item."""
        remains = self.remains.get(item.origin)
        return self.options.undo != "none" and remains is not None and remains.name == item.name

    def counts(self) -> dict[str, int]:
        """Return the number of tensors of each fate; converted tensors count as copied, too."""
        fates = Counter(item.fate for item in self.items)
        fates["copied"] += fates["converted"]
        kinds = ("merged", "replaced", "added", "copied", "converted")
        return {"total": len(self.items)} | {kind: fates[kind] for kind in kinds}

    @property
    def output_config(self) -> Mapping[str, Any] | None:
        """The output's config.json; None if the base has none."""
        return self.base.config if self.config is None else self.config

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-128 of the plan as JSON lines without paths: equal plans have equal fingerprints."""
        from .facts import describe

        options, words = self.options, self.options.combination.words
        lines: list[Any] = [[options.compute_dtype, options.undo, self.index_name, self.config]]
        lines += [words] if words else []
        for shard in self.shards:
            lines += [[shard.filename, dict(shard.metadata)], *map(describe, shard.items)]
        return xxhash.xxh3_128_hexdigest(msgspec.json.Encoder().encode_lines(lines))


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
    quantised: str = ""
    """The choice for quantised weights: "all" are written dense, or the "touched" ones, or few bits are coded
    "again", or the base is read "as nf4" or the like; by default changed ones are coded again if their bits suffice."""
    strict: bool = False
    """True if an adapter must hold all that its config says was trained."""
    facts: AdapterFacts = NO_FACTS
    combination: Combination = SUM

    @property
    def waived(self) -> Waived:
        """The caller's words about adapters."""
        return Waived(self.ignore_field, self.ignore_file, self.facts)

    @property
    def exact(self) -> bool:
        """True if the undo record holds even what rounding loses."""
        return self.undo == "exact"

    @property
    def width(self) -> int:
        """Bytes of an element in arithmetic."""
        return BITS[self.compute_dtype] // 8

    @property
    def selective(self) -> bool:
        """True if --include or --exclude names modules."""
        return bool(self.include or self.exclude)

    def selects(self, module: str) -> bool:
        """Return True if --include and --exclude leave a module in."""
        if self.include and not any(_matches(module, glob) for glob in self.include):
            return False
        return not (self.exclude and any(_matches(module, glob) for glob in self.exclude))

    def check_globs(self, modules: Iterable[str]) -> Iterator[str]:
        """Yield a warning for each --exclude that matches no module; raise UsageError for such an --include."""
        modules = {*modules} if self.selective else ()
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
        **{name: given.get(name, ()) for name in ("include", "exclude", "ignore_field", "ignore_file")},
        **{name: given.get(name, False) for name in ("allow_unmatched", "strict")},
        quantised=_quantised(given),
        legacy_config=given.get("legacy_config", False),
        facts=parse_facts(given),
    )


def _quantised(given: Mapping[str, Any]) -> str:
    """Return the caller's choice for quantised weights, which few calls make."""
    if not any(given.get(name) for name in ("dequantize", "dequantize_touched", "requantize", "base_as")):
        return ""
    from .quantised_config import parse_choice

    return parse_choice(given)


def parse_weights(given: Sequence[float] | float, count: int) -> tuple[float, ...]:
    """Return one finite weight for each adapter; no weights at all means 1 for each."""
    weights = tuple(given) if isinstance(given, Sequence) else (given,)
    if weights and len(weights) != count:
        raise UsageError(f"{len(weights)} --weight for {count} adapters.", hint="give one per ADAPTER, or none")
    if not all(map(math.isfinite, weights)):
        raise UsageError("--weight must be a finite number.")
    return weights or (1.0,) * count
