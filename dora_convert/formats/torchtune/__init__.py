"""Read torchtune's adapters: its own `adapter_model.pt`, and the PEFT files that it writes beside, repaired.

The own file has the model's names in torchtune (`layers.0.attn.q_proj`), for a weight of (out, in):

    .lora_a.weight (r, in)   .lora_b.weight (out, r)   .magnitude (out)

The scaling is alpha/r; `adapter_config.json` beside the file has alpha, the file itself has not. In the models of
Meta's family, rows of q_proj and k_proj lie in Meta's order: the two halves of each head's rotary pairs alternate.

The PEFT files need three repairs. The config does not say use_dora. The magnitudes of q_proj and k_proj keep Meta's
order. In Qwen's models, whose base is not reordered, the exporter reorders lora_B all the same. torchtune computes
the bias inside the norm, so the bias follows its weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from ...adapters import NOTHING, Adapter, Change, Decomposed, LowRank, Update, Waived
from ...adapters.facts import Scaling
from ...adapters.parts import Findings, Parts, follow, sort_parts, wrong_parts
from ...adapters.rotary import head_size, heads_unknown, inverse, meta_rows
from ...errors import UnsupportedError
from ...storage.checkpoint import Checkpoint
from ...storage.file_view import CONFIG, FileView
from ...storage.refs import Source
from ...storage.safetensors import StoredTensor
from ...storage.stored_view import view as view_of
from .names import META, MODULES, OWN, PLAIN, ROTARY

if TYPE_CHECKING:
    from ...adapters.new_adapter import Writer

NAME = "torchtune"
LIBRARY = "torchtune"
TAKES = ("alpha", "scaling")
_CHECKPOINT = re.compile(r"adapter_\d+\.pt")
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ENDS: Mapping[str, str] = {
    ".lora_a.weight": "A", ".lora_b.weight": "B", ".magnitude": "m",
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_magnitude_vector": "m",
}  # fmt: skip
FIELDS = {"r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path"}
"""The fields of the config that torchtune writes, which has no others."""
PREFIX = "base_model.model."


def recognises(view: FileView) -> bool:
    """Return True for torchtune's file, or for the config and the PEFT files that it writes."""
    if view.config.keys() == FIELDS and any(view.has(name) for name in (OWN, *PEFT_FILES)):
        return not view.lone or any(name in (OWN, *PEFT_FILES) for name in view.names)
    return view.find(_is_torchtune) is not None


def _is_torchtune(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(name.endswith(".lora_a.weight") for name in tensors)


def read(source: Source, waived: Waived = NOTHING) -> Adapter:
    """Read torchtune's own file if there is one, else the PEFT files; UnsupportedError without alpha."""
    view = FileView.of(source.path)
    if view.lone and view.folder and view.config.keys() == FIELDS:
        view = FileView.of(view.folder)
    file = _file(view, source)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in view.need(file).tensors.items()}
    modules, rest = sort_parts(tensors, ENDS)
    findings, scaling = Findings(), Scaling(waived.facts, "torchtune's adapter_model.pt", "16, with rank 8")
    exported = not _is_torchtune(tensors)
    known = view.config.get("lora_alpha")
    alpha = float(known) if isinstance(known, int | float) else None
    for module, parts in modules.items():
        if why := wrong_parts(parts, {"A", "B"}, ENDS):
            findings.fault(parts.values(), why)
        else:
            findings.changes.append(_change(module if exported else hub_name(module), parts, scaling, alpha))
    findings.fault(rest.values(), "is not part of a LoRA of torchtune's form")
    is_dora = any(isinstance(change.update, Decomposed) for change in findings.changes)
    base = view.config.get("base_model_name_or_path")
    return findings.adapter(
        view,
        [*([CONFIG] if view.has(CONFIG) else []), file],
        source,
        format=NAME,
        kind="DoRA" if is_dora else "LoRA",
        maker="torchtune, exported for PEFT" if exported else None,
        base=base if isinstance(base, str) and base else None,
        fit=partial(fit, exported=exported),
    )


def _file(view: FileView, source: Source) -> str:
    """Return the file with the tensors: torchtune's own before the PEFT file."""
    numbered = sorted((name for name in view.names if _CHECKPOINT.fullmatch(name)), key=lambda name: int(name[8:-3]))
    for name in (OWN, *PEFT_FILES):
        if view.has(name):
            return name
    return numbered[-1] if numbered else view.only(_is_torchtune, source.name)


def hub_name(module: str) -> str:
    """Return the Hub's name of a module of torchtune's models."""
    if match := re.fullmatch(r"(?:decoder\.)?layers\.(\d+)\.(.+)", module):
        return f"model.layers.{match[1]}.{MODULES.get(match[2], match[2])}"
    return {"output": "lm_head", "tok_embeddings": "model.embed_tokens"}.get(module, module)


def _change(module: str, parts: Parts, scaling: Scaling, alpha: float | None) -> Change:
    """Return the change of a module's weight, in the order of the file's rows."""
    scale, rule = scaling.of(parts["A"].shape[0], alpha)
    low = LowRank(parts["A"], parts["B"], scale, transposed=False)
    update: Update = Decomposed(low, parts["m"]) if "m" in parts else low
    return Change(f"{module}.weight", update, rule=rule)


def fit(adapter: Adapter, base: Checkpoint, *, exported: bool) -> Adapter:
    """Return an adapter with all rows in the base's order, and with the biases of a DoRA.

    Raises UnsupportedError for a base whose order is not known.
    """
    kinds = base.model_types
    if not kinds & (META | PLAIN) and any(change.module.endswith(ROTARY) for change in adapter.changes):
        family = ", ".join(sorted(kinds)) or "a base without config"
        raise UnsupportedError(
            f"torchtune's order of q_proj's rows is not known for {family}.", hint="merge it with torchtune itself"
        )
    repairs: tuple[str, ...] = ()
    changes = tuple(_ordered(change, base, exported=exported) for change in adapter.changes)
    if exported and changes != adapter.changes:
        what = "lora_B in an order that the base does not have" if kinds & PLAIN else "magnitudes in Meta's order"
        repairs = (f"{adapter.source.name} is torchtune's export, with {what}: q_proj and k_proj were put back",)
    fitted = replace(adapter, changes=changes, warnings=(*adapter.warnings, *repairs))
    return follow(fitted, base) if adapter.kind == "DoRA" else fitted


def _ordered(change: Change, base: Checkpoint, *, exported: bool) -> Change:
    """Return a change of q_proj or k_proj with its rows in the base's order; any other change as it is."""
    if not change.module.endswith(ROTARY):
        return change
    is_meta = bool(base.model_types & META)
    update = change.update
    low = update.inner if isinstance(update, Decomposed) else update
    assert isinstance(low, LowRank)
    if not (size := head_size(base, low.B.shape[0], change.module)):
        raise heads_unknown(base, change.module)
    rows = meta_rows(low.B.shape[0], size)
    if is_meta and not exported:
        low = replace(low, B=view_of(low.B, rows))
    elif exported and not is_meta:  # the exporter reordered what was in order
        low = replace(low, B=view_of(low.B, inverse(rows)))
    if not isinstance(update, Decomposed):
        return replace(change, update=low)
    m = view_of(update.m, rows) if is_meta else update.m
    return replace(change, update=replace(update, inner=low, m=m))


def writer() -> Writer:
    """Return what writes the format. A merge never imports it."""
    from . import write

    return cast("Writer", write)
