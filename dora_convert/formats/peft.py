r"""PEFT's adapter folders: `adapter_config.json` beside `adapter_model.safetensors`.

Tensor names are `base_model.model.<module>` and a suffix, shapes for a weight of (out, in):

    .lora_A.weight  (r, in)      .lora_B.weight  (out, r)      Linear, and GPT-2's Conv1D
    .lora_A.weight  (r, in, *k)  .lora_B.weight  (out, r, 1…)  convolutions
    .lora_embedding_A  (r, rows) .lora_embedding_B  (dim, r)   embeddings, whose weight is (rows, dim)
    .lora_magnitude_vector       (out), (dim) or (1, out, 1…)  DoRA; some versions append `.weight`
    .base_layer.weight                                         the base's own tensor, saved beside its adapter
    <module>.<key>                                             a module of `modules_to_save`, absolute values

The scaling is alpha/r, or alpha/√r with `use_rslora`, where `rank_pattern` and `alpha_pattern` may change r and alpha
per module: the first key in the order of the file that matches `(.*\.)?(key)$` counts.

What a config can say beyond that is refused by name, never merged wrongly: see `peft_config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..adapter import Adapter, Change
from ..checkpoint import read_json
from ..errors import Fault, MalformedError, PlanError, UnsupportedError
from ..refs import Source
from ..stored import FLOATS, Stored, read_header
from ..updates import Decomposed, Full, LowRank
from .peft_config import Config, refuse_unsupported

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
}


def recognises(path: Path) -> bool:
    """Whether the folder is a PEFT adapter."""
    return (path / CONFIG).is_file()


def read(source: Source) -> Adapter:
    """Read a PEFT adapter's config and headers.

    Raises MalformedError for values of a wrong type, UnsupportedError for what is recognised and refused, PlanError
    when tensors and config contradict each other.
    """
    raw = read_json(source.path / CONFIG)
    refuse_unsupported(raw, source.name)
    config = Config.parse(raw, source.path / CONFIG)
    tensors = read_header(_weights(source)).tensors
    changes, faults = _changes(tensors, config)
    if faults:
        raise PlanError(
            f"The adapter {source.name} contradicts itself in {len(faults)} places.", faults=faults
        )
    return Adapter(
        source=source,
        format="peft",
        kind="DoRA" if config.use_dora else "LoRA",
        changes=tuple(changes),
        tensors=tensors,
        files=(source.path / CONFIG, source.path / WEIGHTS),
        base=config.base,
        revision=config.revision,
    )


def _weights(source: Source) -> Path:
    path = source.path / WEIGHTS
    if path.exists():
        return path
    if (source.path / "adapter_model.bin").exists():
        raise UnsupportedError(
            f"The adapter {source.name} is a pickle (adapter_model.bin), which is not read yet.",
            hint="load it with PEFT and save it again: it writes safetensors",
        )
    raise MalformedError(f"The adapter {source.name} has {CONFIG} but no {WEIGHTS}.")


def _changes(tensors: Mapping[str, Stored], config: Config) -> tuple[list[Change], list[Fault]]:
    """Sort tensors into updates by their names."""
    changes: list[Change] = []
    faults: list[Fault] = []
    modules: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        target = name.removeprefix(PREFIX)
        suffix = next((suffix for suffix in _PARTS if target.endswith(suffix)), None)
        if suffix:
            parts = modules.setdefault(target.removesuffix(suffix), {})
            if _PARTS[suffix] in parts:
                faults.append(Fault(name, f"says what {parts[_PARTS[suffix]].name} says already"))
            parts[_PARTS[suffix]] = tensor
        elif target.endswith(".base_layer.weight"):
            changes.append(Change(target.replace(".base_layer.weight", ".weight"), Full(tensor)))
        elif config.saves(target):
            changes.append(Change(target, Full(tensor)))
        else:
            faults.append(Fault(name, "neither a LoRA tensor nor part of modules_to_save"))
    for module, parts in modules.items():
        found = _update(module, parts, config)
        if isinstance(found, Fault):
            faults.append(found)
        else:
            changes.append(Change(f"{module}.weight", found))
    return changes, faults


def _update(module: str, parts: Mapping[str, Stored], config: Config) -> LowRank | Decomposed | Fault:
    """One module's update, or what is wrong with it."""
    if why := _contradiction(module, parts, config):
        return Fault(module, why)
    A, m = parts["A"], parts.get("m")
    update = LowRank(A, parts["B"], config.scaling(module), _orientation(A))
    return Decomposed(update, m) if m else update


def _contradiction(module: str, parts: Mapping[str, Stored], config: Config) -> str | None:
    """Why a module's tensors make no update, or None where they do."""
    if missing := sorted({"A", "B"} - parts.keys()):
        return f"has no lora_{missing[0]}"
    if odd := [part for part in parts.values() if part.dtype not in FLOATS]:
        return f"is stored as {odd[0].dtype}; adapters of that dtype are not merged"
    if ".base_layer" in module:
        return "an adapter inside a wrapped layer (MultiheadAttention, experts) is not merged yet"
    if ("m" in parts) != config.use_dora:
        if config.use_dora:
            return "use_dora is set, but there is no lora_magnitude_vector"
        return "there is a lora_magnitude_vector, but use_dora is not set"
    A, B, rank = parts["A"].shape, parts["B"].shape, config.rank(module)
    if len(A) > 2 and len(B) > 1 and B[1] < rank == A[0]:
        return "a grouped convolution; not merged yet"
    if len(A) < 2 or len(B) < 2 or not A[0] == B[1] == rank:
        return f"the config says rank {rank}; lora_A is {A} and lora_B is {B}"
    return None


def _orientation(A: Stored) -> bool | None:
    if A.name.endswith(".lora_embedding_A"):
        return True
    return None if len(A.shape) == 2 else False
