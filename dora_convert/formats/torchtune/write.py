"""Write torchtune's own `adapter_model.pt`, and the config beside it that has rank and alpha.

Ranks are padded with zeros. If scalings differ, they are folded into `lora_b`. Rows of q_proj and k_proj, and their
magnitudes, are put in Meta's order for the families that torchtune keeps so, which only the base's config tells.
"""

from __future__ import annotations

import json
import re

from ...adapters import Adapter, Change
from ...adapters.new_adapter import Files, NewAdapter, ShapedTensor
from ...adapters.rotary import head_size, heads_unknown, inverse, meta_rows
from ...adapters.writing import HINT, factors_of, matrices, one_scale, shaped
from ...errors import UnsupportedError, UsageError
from ...storage.safetensors import StoredTensor
from ...storage.stored_view import view
from .names import META, MODULES, OWN, PLAIN, ROTARY

CONFIG = "adapter_config.json"
NAMES = {hub: own for own, hub in MODULES.items()}


def save(new: NewAdapter) -> Files:
    """Return the files; UnsupportedError for modules that torchtune's models lack, UsageError without a base."""
    found = factors_of(new, "torchtune")
    rank, scale, folded = one_scale(found)
    tensors: dict[str, ShapedTensor] = {}
    for each in found:
        A, B = matrices(each.low)
        name, rows = own_name(each.module), _rows(new, each.module, B.shape[0])
        B = view(B, rows) if rows else B
        tensors[f"{name}.lora_a.weight"] = shaped(A, (rank, A.shape[1]))
        tensors[f"{name}.lora_b.weight"] = shaped(B, (B.shape[0], rank), each.low.scale if folded else 1.0)
        if each.m:
            tensors[f"{name}.magnitude"] = shaped(_vector(each.m, rows), (each.m.numel,))
    config = {
        "r": rank,
        "lora_alpha": rank * scale,
        "target_modules": sorted({each.module.rpartition(".")[2] for each in found}),
        "peft_type": "LORA",
        "base_model_name_or_path": new.base or "",
    }
    return Files(OWN, tensors, {CONFIG: (json.dumps(config, indent=2) + "\n").encode()}, folded=folded)


def _vector(m: StoredTensor, rows: tuple[int, ...]) -> StoredTensor:
    return view(m, rows) if rows else m


def own_name(module: str) -> str:
    """Return torchtune's name of a module."""
    match = re.fullmatch(r"(?:model\.)?layers\.(\d+)\.(.+)", module)
    if match and match[2] in NAMES:
        return f"layers.{match[1]}.{NAMES[match[2]]}"
    if module == "lm_head":
        return "output"
    raise UnsupportedError(f"{module} is not a module of torchtune's models.", hint=HINT)


def _rows(new: NewAdapter, module: str, outputs: int) -> tuple[int, ...]:
    """Return, for each row in Meta's order, the number of the row in the base's order; () if they are the same."""
    if not module.endswith(ROTARY):
        return ()
    if not new.model:
        raise UsageError("torchtune's order of rows depends on the base.", hint="--base BASE")
    if new.model.model_types & PLAIN:
        return ()
    size = head_size(new.model, outputs, module)
    if not new.model.model_types & META:
        kinds = ", ".join(sorted(new.model.model_types)) or "a model without config.json"
        raise UnsupportedError(f"torchtune's order of rows is not known for {kinds}.", hint="--to peft")
    if not size:
        raise heads_unknown(new.model, module)
    return inverse(meta_rows(outputs, size))


def objection(change: Change, tensor: str, like: Adapter) -> str | None:  # noqa: ARG001 - as all writers
    """Return why torchtune cannot load a LoRA as a DoRA; None if it can."""
    return None


def shares_rank(change: Change, tensor: str, like: Adapter) -> str | None:  # noqa: ARG001 - as all writers
    """Return why a weight's factors must keep their rank; None if they need not."""
    return None
