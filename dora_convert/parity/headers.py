"""Compare the headers and the config.json of a merged checkpoint with the plan."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..naming.resolve import NameResolver, find_tie
from ..plan.item import Item
from ..plan.plan import Plan
from ..storage.checkpoint import Checkpoint
from ..storage.reader import Reader
from ..storage.safetensors import CONFIG_DTYPES, FLOATS, StoredTensor

BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|position_ids|attn\.bias)$")
"""Tensors that transformers computes anew and does not always save."""
NO_MATTER = frozenset(
    {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "name_or_path", "use_cache", "auto_map"}
)
"""Fields of configs that change neither loading nor computing."""


@dataclass
class Pairing:
    """The planned tensors paired with the merged checkpoint's, and the problems of the others."""

    pairs: list[tuple[Item, StoredTensor]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    twins: list[tuple[StoredTensor, StoredTensor]] = field(default_factory=list)
    """Heads that are stored although they are tied, each with its embedding."""

    def note(self, name: str, difference: str) -> None:
        """Note a tensor that only one side has: a problem, if transformers does not compute the tensor anew."""
        (self.notes if BUFFERS.search(name) else self.problems).append(f"{name} {difference}")

    def compare_twins(self, reader: Reader) -> None:
        """Compare each head that is stored although it is tied with its embedding."""
        for head, embedding in self.twins:
            if reader.same_bytes(head, embedding):
                self.notes.append(f"{head.name} is stored beside {embedding.name}, which it equals")
            else:
                self.problems.append(f"{head.name} differs from {embedding.name}, which it is tied to")


def pair(plan: Plan, merged: Checkpoint) -> Pairing:
    """Find each planned tensor in a merged checkpoint; a prefix that all names share is ignored."""
    pairing, taken = Pairing(), set[str]()
    names = NameResolver(merged.tensors, [item.name for item in plan.items])
    for item in plan.items:
        name = names.find(item.name)
        if name is None:
            pairing.note(item.name, "is missing from MERGED")
            continue
        taken.add(name)
        written = merged.tensors[name]
        converted = written.dtype != item.dtype and not {written.dtype, item.dtype} <= set(FLOATS)
        if written.shape != item.shape or converted:
            wanted = f"{item.dtype} {list(item.shape)}"
            pairing.problems.append(f"{name} is {written.dtype} {list(written.shape)}; it should be {wanted}")
        else:
            pairing.pairs.append((item, written))
    _compare_ties(plan, merged, taken, pairing)
    for name in sorted(merged.tensors.keys() - taken):
        pairing.note(name, "is in MERGED, but not in the plan")
    return pairing


def _compare_ties(plan: Plan, merged: Checkpoint, taken: set[str], pairing: Pairing) -> None:
    """Note a problem if embedding and head are tied and should not be, or the other way round."""
    config, problems = plan.output_config, pairing.problems
    before, after = find_tie(plan.base), find_tie(merged)
    if before is None or merged.config is None:
        return
    wanted = find_tie(replace(plan.base, config=config))
    untied = not wanted and bool(config and config.get("tie_word_embeddings") is False)
    if untied and after:
        problems.append(f"config.json ties {after.head} to {after.embedding}; the adapter made two weights of them")
    elif wanted and not after and before.head not in merged.tensors:
        problems.append(
            f"config.json does not tie {before.head} to {before.embedding}, and MERGED has no {before.head}"
        )
    extra, embedding = merged.tensors.get(before.head), merged.tensors.get(before.embedding)
    if not untied and before.head not in taken and extra and embedding:
        taken.add(before.head)
        pairing.twins.append((extra, embedding))


def config_problems(plan: Plan, merged: Checkpoint) -> Iterator[str]:
    """Yield the fields of config.json that differ and change loading or computing."""
    base, wanted = plan.base.config, plan.output_config
    if wanted is None or merged.is_file:
        return
    if merged.config is None:
        yield "config.json is missing from MERGED"
        return
    yield from _differences(wanted, merged.config, "")
    yield from _wrong_dtype(wanted, merged)
    edited = {key for key in wanted if base is None or base.get(key) != wanted[key]}
    for key in sorted(edited - merged.config.keys() - NO_MATTER):
        yield f"config.json: {key} should be {wanted[key]!r}; it is missing"


def _wrong_dtype(wanted: Mapping[str, Any], merged: Checkpoint) -> Iterator[str]:
    """Yield a dtype of config.json that is neither the base's nor the dtype of the stored tensors."""
    dtypes = Counter(tensor.dtype for tensor in merged.tensors.values() if tensor.dtype in FLOATS)
    stored = {CONFIG_DTYPES.get(dtype) for dtype, _ in dtypes.most_common(1)}
    for key in ("dtype", "torch_dtype"):
        dtype = (merged.config or {}).get(key)
        if isinstance(dtype, str) and dtype not in {*stored, wanted.get("dtype"), wanted.get("torch_dtype")}:
            yield f"config.json: {key} is {dtype!r}, which is not the dtype of the stored tensors"


def _differences(wanted: Mapping[str, Any], got: Mapping[str, Any], where: str) -> Iterator[str]:
    for key in wanted.keys() & got.keys() - NO_MATTER:
        one, other = wanted[key], got[key]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{where}{key}.")
        elif one != other:
            yield f"config.json: {where}{key} is {other!r}; it should be {one!r}"
