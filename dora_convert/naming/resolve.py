"""From an adapter's names to the base's: wrappers, prefixes, and what to say of a name that is not there.

Names on disk are taken to be the module names, which holds for most models; families where it does not are listed in
`RENAMED` and refused as soon as a name fails to match.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..storage.checkpoint import Checkpoint
from ..storage.safetensors import StoredTensor
from .ties import is_head

RENAMED = frozenset(
    {
        "mixtral", "minimax", "minimax_m2", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2",
        "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "olmoe", "flex_olmo", "dots1",
        "ernie4_5_moe", "hunyuan_v1_moe", "exaone_moe", "cohere2_moe", "longcat_flash", "solar_open", "afmoe",
        "qwen3_omni_moe", "qwen3_5_moe", "jamba", "nemotron_h", "lfm2_moe", "granitemoe", "granitemoeshared",
        "granitemoehybrid", "qwen3_vl_moe", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "llava", "llava_next",
        "llava_next_video", "llava_onevision", "gemma3", "mistral3", "paligemma", "internvl", "aya_vision", "aria",
        "got_ocr2", "vipllava", "mllama", "fuyu", "video_llava", "emu3", "gemma3n", "gemma3n_text", "qwen3_5_text",
        "gpt_neox",
    }
)  # fmt: skip
"""Model types whose tensors may be called something else on disk than in the running model (transformers 5)."""

WRAPPER = "module"
"""What DistributedDataParallel calls the model inside it; other wrappers' names never mean anything else."""


@dataclass(frozen=True)
class Prefix:
    """What an adapter's names begin with and the base's do not, and the other way round."""

    drop: str = ""  # with its last dot
    add: str = ""

    def apply(self, name: str) -> str:
        """The base's name of a tensor, as far as the prefix decides it."""
        return self.add + name.removeprefix(self.drop) if name.startswith(self.drop) else name


class NameResolver:
    """How one adapter's names of weights become the base's.

    They are the base's own; or all of them differ by one prefix, the only one that leads each of them to a tensor: such
    adapters were trained on a model without its head, or on one that was wrapped.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], targets: Sequence[str]) -> None:
        self._tensors = tensors
        self.prefix = Prefix()
        self.ambiguous: tuple[Prefix, ...] = ()
        if targets and not any(self.find(target) for target in targets):
            found = self._prefixes([unwrapped(target) for target in targets])
            if len(found) == 1:
                self.prefix = found[0]
            self.ambiguous = found[1:] and found

    def find(self, target: str) -> str | None:
        """The base's name of a target; None where it has no such tensor."""
        for name in (self.prefix.apply(target), self.prefix.apply(unwrapped(target))):
            if name in self._tensors:
                return name
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and f"{module}.in_proj_weight" in self._tensors:
                return f"{module}.in_proj_weight"  # MultiheadAttention
            if leaf == "bias" and f"{module.removesuffix('.decoder')}.bias" in self._tensors:
                return (
                    f"{module.removesuffix('.decoder')}.bias"  # BERT's head, whose decoder's bias is its own
                )
        return None

    def _prefixes(self, targets: Sequence[str]) -> tuple[Prefix, ...]:
        """Every prefix that leads all targets to tensors, of those that drop least; none reaches into a stack of layers."""
        parts = max(targets, key=lambda target: target.count(".")).split(".")
        for dropped in range(len(parts) - 1):
            if any(part.isdigit() for part in parts[: dropped + 1]):
                break
            drop, rest = "".join(f"{part}." for part in parts[:dropped]), ".".join(parts[dropped:])
            adds = {name.removesuffix(rest) for name in self._tensors if f".{name}".endswith(f".{rest}")}
            fitting = tuple(Prefix(drop, add) for add in sorted(adds) if self._fits(drop, add, targets))
            if fitting:
                return fitting
        return ()

    def _fits(self, drop: str, add: str, targets: Sequence[str]) -> bool:
        """Whether a prefix leads every target to a tensor."""
        inside = any(part.isdigit() for part in add.split("."))
        return not inside and all(
            target.startswith(drop) and add + target.removeprefix(drop) in self._tensors for target in targets
        )


def unwrapped(name: str) -> str:
    """A name without the part that a data-parallel wrapper puts in."""
    return ".".join(part for part in name.split(".") if part != WRAPPER)


def explain_missing(target: str, names: NameResolver, base: Checkpoint) -> str:
    """Why the base has no tensor of that name: another layout, a missing bias, or a typo with its nearest names."""
    if names.ambiguous:
        shown = ", ".join(prefix.apply(target) for prefix in names.ambiguous[:3])
        return f"could be any of {shown}"
    module, _, leaf = names.prefix.apply(target).rpartition(".")
    if found := sorted(base.model_types & RENAMED):
        return f"{found[0]} checkpoints name tensors otherwise than modules; not matched yet"
    if is_head(target):
        return f"the base has no {target}, and its config does not tie it to the embedding"
    siblings = base.modules.get(module.rpartition(".")[0], ())
    if module in siblings:
        return f"the base's {module} has no {leaf}"
    return f"no such module; closest: {', '.join(closest(module, siblings, base)) or 'none'}"


def closest(module: str, siblings: Sequence[str], base: Checkpoint) -> list[str]:
    """Up to three module names like a missing one: its siblings first, else the most similar."""
    leaf = module.rpartition(".")[2]
    if leaf != module and siblings:
        leaves = [name.rpartition(".")[2] for name in siblings]
        return [f"…{name}" for name in difflib.get_close_matches(leaf, leaves, 3, 0)]
    numbers = re.findall(r"\d+", module)
    return [_numbered(kind, numbers) for kind in _similar(_kind(module), base.module_kinds)]


def _numbered(kind: str, numbers: Sequence[str]) -> str:
    """A kind with its stars replaced by numbers, as far as there are some."""
    left = iter(numbers)
    return re.sub(r"\*", lambda star: next(left, star[0]), kind)


def _kind(module: str) -> str:
    return re.sub(r"\d+", "*", module)


@lru_cache
def _similar(kind: str, kinds: Sequence[str]) -> list[str]:
    """Kinds like one; a model has few, however many layers and experts it has."""
    return difflib.get_close_matches(kind, kinds, 3, 0.5)
