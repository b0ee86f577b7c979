"""Decide what becomes of a quantised base: each coded weight is written dense, kept as bytes, or coded again.

The planner sees the base as if it were dense. Afterwards this file says which stored tensors the output has.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..codecs.as_trained import AsTrained
from ..codecs.coded import CodedTensor
from ..codecs.detect import find_coded, with_dense
from ..codecs.evidence import SIDE_FILE, Evidence
from ..errors import Fault, UnsupportedError, UsageError
from ..naming.families import TABLES
from ..naming.resolve import is_embedding, is_head
from ..storage.checkpoint import Checkpoint, Shard
from ..storage.json_files import read_json
from ..storage.safetensors import FLOATS, StoredTensor
from .item import Item
from .plan import Options, Plan
from .quantised_config import dense_modules, skipping, undescribed, without_quantisation
from .shapes import is_conv1d
from .sharding import lay_out

FUSED = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"), ("in_proj_qkvz", "in_proj_ba"),
)  # fmt: skip
"""Last names of modules that servers fuse into one: all of them are quantised, or none is."""
AS = "as "
"""The beginning of a choice to read a dense base as a quantised training saw it."""
EXPERTS = re.compile(r"(.*\.experts\.)\d+\.")
NAMES = {
    "hqq": "HQQ", "quanto": "quanto", "eetq": "EETQ", "aqlm": "AQLM", "vptq": "VPTQ", "spqr": "SpQR", "higgs": "HIGGS",
    "bitnet": "BitNet", "quark": "quark", "fbgemm_fp8": "FBGEMM", "auto-round": "auto-round", "awq": "AWQ",
    "gguf": "GGUF",
}  # fmt: skip
"""Names of methods as their authors write them."""


@dataclass(frozen=True)
class QuantisedBase:
    """A base that has coded tensors, or a config that says so."""

    base: Checkpoint
    coded: Mapping[str, CodedTensor]
    options: Options

    @classmethod
    def of(cls, base: Checkpoint, options: Options) -> QuantisedBase | None:
        """Return the base with its coded tensors; None if it has none and says nothing of quantisation."""
        coded = find_coded(base, options.dtype)
        if options.quantised.startswith(AS):
            coded = _as_trained(base, coded, options)
        quantised = cls(base, coded, options)
        return quantised if coded or quantised.methods else None

    @property
    def _all_dense(self) -> bool:
        """True if all quantised weights are written dense."""
        return self.options.quantised == "all" or self.options.quantised.startswith(AS)

    @cached_property
    def dense(self) -> Checkpoint:
        """The base as if it were dense."""
        return with_dense(self.base, self.coded) if self.coded else self.base

    @cached_property
    def methods(self) -> Sequence[Mapping[str, Any]]:
        """All that configs say of quantisation."""
        return Evidence(self.base).methods

    @cached_property
    def unread(self) -> bool:
        """True if tensors are quantised in a way that is not read."""
        return not self.coded and any(tensor.dtype not in FLOATS for tensor in self.base.tensors.values())

    @property
    def title(self) -> str:
        """The method's name, for messages."""
        said = self.methods[0] if self.methods else {}
        name = str(said.get("quant_method") or "an unknown method")
        detail = said.get("format") or said.get("version") or ""
        return NAMES.get(name, name) + (f" ({detail})" if detail else "")

    def refuse_unread(self, faults: Collection[Fault]) -> None:
        """Raise UnsupportedError if an adapter needs tensors that are quantised in a way that is not read."""
        if self.unread and self.methods and (faults or self.options.quantised):
            raise UnsupportedError(
                f"{self.base.source.name} is quantised by {self.title}, which is not read.",
                hint="name the full-precision checkpoint that it was made from",
            )

    def refuse_conv1d(self, names: Iterable[str]) -> None:
        """Raise UnsupportedError for quantised Conv1D weights: tools store (out, in), the model has (in, out)."""
        chosen = [name for name in names if name in self.coded and is_conv1d(name, self.base.model_types)]
        if chosen:
            raise UnsupportedError(
                f"{self.base.source.name} has quantised weights of Conv1D, which are stored transposed: not read.",
                faults=[Fault(name, self.coded[name].scheme.title) for name in chosen],
                hint="name the full-precision checkpoint that it was made from",
            )

    def warnings(self) -> Iterator[str]:
        """Yield a warning if the config says quantised and the weights are dense."""
        if not self.coded and not self.unread and not self.base.gguf:
            rest = "" if self.options.quantised == "all" else "; the field stays as it is, and --dequantize removes it"
            yield f"{self.base.source.name} says that it is quantised ({self.title}), but its weights are dense{rest}"

    def settled(self, plan: Plan, items: Mapping[str, Item], tree: Checkpoint) -> Plan:
        """Return the plan of a dense base with the tensors that the output has: dense ones, and parts of the others.

        `tree` is the dense base, perhaps with other names. Raises UnsupportedError for weights that the adapter
        changes and that cannot be coded again.
        """
        if self.base.gguf and self.coded and not self._all_dense:
            raise UnsupportedError(
                f"{self.base.source.name} is a GGUF model, and a merge writes no GGUF files.",
                hint="--dequantize writes a dense checkpoint",
            )
        self.refuse_conv1d(name for name, item in items.items() if item.changed or self._all_dense)
        plan = replace(plan, warnings=(*plan.warnings, *self.warnings()))
        again = self._coded_again(items)
        dense = self._dense_names(items, again)
        kept = [tensor for name, tensor in self.coded.items() if name not in dense]
        if kept and tree.renamed:
            raise UnsupportedError(
                "The merge names the base's layers anew, which quantised weights do not follow.",
                hint="--dequantize writes all weights dense",
            )
        if not kept:
            return self._without_codes(plan, items, tree)
        own = {name: item for name, item in items.items() if name not in self.coded or name in dense}
        for tensor in kept:
            own |= _parts(tensor, items[tensor.name] if tensor.name in again else None)
        return self._laid_out(self._listing(plan, sorted(dense)) if dense else plan, own, self._layout(dense))

    def _without_codes(self, plan: Plan, items: Mapping[str, Item], tree: Checkpoint) -> Plan:
        """Return the plan of an output that has no coded weight, and does not say that it has."""
        if not self.coded and not self._all_dense:
            return plan
        config = plan.output_config
        plan = self._with_config(plan, config and without_quantisation(config), {SIDE_FILE: None})
        return self._laid_out(plan, items, replace(tree, shards=tuple(map(_described_as_dense, tree.shards))))

    def _listing(self, plan: Plan, dense: Sequence[str]) -> Plan:
        """Return the plan with a config that lists some weights as dense."""
        modules, others = [name.removesuffix(".weight") for name in dense], dense_modules(self.base, self.coded)
        config, side = plan.output_config, self.base.root / SIDE_FILE
        files: dict[str, Mapping[str, Any] | None] = {}
        if side.is_file() and not self.base.is_file:
            files[SIDE_FILE] = skipping(read_json(side), modules, others)
        return self._with_config(plan, config and skipping(config, modules, others), files)

    def _with_config(
        self, plan: Plan, config: Mapping[str, Any] | None, files: Mapping[str, Mapping[str, Any] | None]
    ) -> Plan:
        return replace(plan, config=config if config != self.base.config else None, files=files)

    def _laid_out(self, plan: Plan, items: Mapping[str, Item], tree: Checkpoint) -> Plan:
        shards, index_name = lay_out(tree, items, self.options.max_shard_size)
        return replace(plan, shards=shards, index_name=index_name)

    def _layout(self, dense: Collection[str]) -> Checkpoint:
        """Return the base with its dense weights in their codes' places, and all other tensors as on disk."""
        chosen = {name: tensor for name, tensor in self.coded.items() if name in dense}
        shown = with_dense(self.base, chosen)
        return replace(shown, shards=tuple(_described_as_dense(shard, chosen) for shard in shown.shards))

    def _coded_again(self, items: Mapping[str, Item]) -> set[str]:
        """Return the weights that are coded again; raise UnsupportedError for those that cannot be."""
        if self._all_dense or self.options.quantised == "touched":
            return set()
        touched = {name: self.coded[name] for name, item in items.items() if name in self.coded and item.changed}
        touched = {name: tensor for name, tensor in touched.items() if not _must_be_dense(items[name])}
        allowed = ("back", "asked") if self.options.quantised == "again" else ("back",)
        faults = {name: tensor for name, tensor in touched.items() if tensor.scheme.writes not in allowed}
        if faults:
            raise self._refusal(faults)
        return set(touched)

    def _refusal(self, faults: Mapping[str, CodedTensor]) -> UnsupportedError:
        """Return the error that names the ways out."""
        hint = (
            "--dequantize writes all weights dense, into OUT; --dequantize-touched only those that the adapter changes"
        )
        may = [tensor for tensor in faults.values() if tensor.scheme.writes == "asked"]
        if may:
            hint += "; --requantize rounds to the old bits, which loses most of the change"
            why = "so few bits do not hold what was trained"
        else:
            why = "their codes were chosen by calibration or are laid out for reading only, and are not made again"
        return UnsupportedError(
            f"The adapter changes {len(faults)} quantised weights of {self.base.source.name}: {why}.",
            faults=[Fault(name, tensor.scheme.title) for name, tensor in faults.items()],
            hint=hint,
        )

    def _dense_names(self, items: Mapping[str, Item], again: Collection[str]) -> set[str]:
        """Return the coded weights that are written dense."""
        if self._all_dense:
            return set(self.coded)
        touched = {name for name, item in items.items() if name in self.coded and item.changed and name not in again}
        return touched | {name for one in touched for name in siblings(one, self.coded)}


def as_dense(base: Checkpoint) -> Checkpoint:
    """Return a checkpoint with its quantised weights shown as dense ones; a dense one is returned as it is."""
    if not base.may_be_quantised or not (quantised := QuantisedBase.of(base, Options(quantised="all"))):
        return base
    quantised.refuse_unread(())
    quantised.refuse_conv1d(quantised.coded)
    return quantised.dense


def _as_trained(base: Checkpoint, coded: Mapping[str, CodedTensor], options: Options) -> dict[str, CodedTensor]:
    """Return the weights that bitsandbytes would quantise, to be decoded as a quantised training saw them."""
    if coded:
        raise UsageError(f"--base-as is for 16-bit bases; {base.source.name} is quantised already.")
    scheme = AsTrained(f"{options.quantised} training saw it", kind=options.quantised.removeprefix(AS))
    return {
        name: CodedTensor(
            name,
            options.dtype or tensor.dtype,
            tensor.shape,
            path=tensor.path,
            start=tensor.start,
            scheme=scheme,
            parts={"codes": tensor},
        )
        for name, tensor in base.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype in FLOATS and not _is_skipped(name)
    }


def _is_skipped(name: str) -> bool:
    """Return True for embeddings and heads."""
    return is_embedding(name) or is_head(name) or name.removesuffix(".weight").rpartition(".")[2] in TABLES


def _must_be_dense(item: Item) -> bool:
    """Return True if an adapter brings the values themselves, or more rows than there are codes for."""
    return item.replaced or bool(item.grown)


def siblings(name: str, coded: Collection[str]) -> Iterator[str]:
    """Yield the coded weights that servers fuse with one."""
    if match := EXPERTS.match(name):
        yield from (other for other in coded if other.startswith(match[1]))
        return
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    for group in FUSED:
        if last in group:
            yield from (other for each in group if (other := f"{parent}.{each}.weight") in coded)


def _parts(tensor: CodedTensor, item: Item | None) -> dict[str, Item]:
    """Return the items of a coded tensor's parts: copies, or those that a changed weight is coded into."""
    parts = {part.name: _copy(part) for part in tensor.parts.values()}
    if item is None:
        return parts
    codes = tensor.parts["codes"]
    made = {role: tensor.parts[role] for role in tensor.scheme.makes if role in tensor.parts}
    others = tuple((role, replace(_copy(part), part_of=codes.name)) for role, part in made.items())
    main = replace(item, name=codes.name, dtype=codes.dtype, shape=codes.shape, origin=codes.name, parts=others)
    return parts | {other.name: other for _, other in others} | {codes.name: main}


def _copy(part: StoredTensor) -> Item:
    return Item(part.name, part.dtype, part.shape, part, part, origin=part.name)


def _described_as_dense(shard: Shard, dense: Collection[str] | None = None) -> Shard:
    """Return a file whose metadata does not describe dense weights as coded; None stands for all weights."""
    return replace(shard, metadata=undescribed(shard.metadata, dense))
