"""Read the adapters of AdapterHub's `adapters` library: LoRA and DoRA by its own config.

`adapter_config.json` has `config.architecture` and `version`; the tensors lie in `pytorch_adapter.bin` or
`adapter.safetensors`. A trained head may lie in `pytorch_model_head.bin`. The tensors of a module, named
`<module>.loras.<adapter>` and an end:

    .lora_A (r, in)   .lora_B (out, r)   .m.weight (out, 1)      LoRA, DoRA
    .vera_D (r, r)    .vera_B (out, out)                         VeRA and DVoRA, with A and B shared by all modules

The norm of a DoRA is that of W + BA, without the scaling: W' = m/‖W + BA‖·(W + sBA). The bias is multiplied, too.
VeRA's change is vera_B·lora_B·vera_D·lora_A, with s = 1... see `_read_vera`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..adapters import NOTHING, Adapter, Change, Decomposed, Full, LowRank, Update, Waived
from ..adapters.parts import Findings, Parts, follow, sort_parts, wrong_parts
from ..errors import MalformedError, UnsupportedError
from ..storage.file_view import CONFIG, FileView
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor

NAME = "hf-adapters"
LIBRARY = "adapters"
TAKES: tuple[str, ...] = ()
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
ENDS: Mapping[str, str] = {
    ".lora_A": "A", ".lora_B": "B", ".m.weight": "m", ".vera_D": "D", ".vera_B": "E", ".gate.weight": "gate",
    ".gate.bias": "gate_bias",
}  # fmt: skip
_MARK = re.compile(r"\.(loras|shared_parameters)\.[^.]+\.")
_OTHER = re.compile(r"\.(adapters|prefix_tunings|prompt_tunings|refts|invertible_adapters)\.")


def recognises(view: FileView) -> bool:
    """Return True for the library's config, or for its names of tensors."""
    nested = view.config.get("config")
    if str(view.config.get("version")).startswith("adapters."):
        return True
    return (isinstance(nested, dict) and "architecture" in nested) or view.find(_is_adapters) is not None


def _is_adapters(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(_MARK.search(name) or _OTHER.search(name) for name in tensors)


def read(source: Source, waived: Waived = NOTHING) -> Adapter:
    """Read the config and the headers; UnsupportedError for methods that add modules to the model."""
    view = FileView.of(source.path)
    nested = view.config.get("config")
    config = nested if isinstance(nested, dict) else {}
    _refuse(config, source)
    files = [name for name in WEIGHTS if view.has(name)][:1]
    files = files or [name for name in view.candidates if _is_adapters(view.tensors(name))][:1]
    if not files:
        raise MalformedError(f"The adapter {source.name} has {CONFIG} but no {WEIGHTS[0]}.")
    tensors = view.need(files[0]).tensors
    if any(_OTHER.search(name) for name in tensors):
        raise UnsupportedError(f"The adapter {source.name} adds modules to the model, so no single weight equals it.")
    modules, rest = sort_parts({_MARK.sub(".", name): tensor for name, tensor in tensors.items()}, ENDS)
    findings = Findings()
    shared = (
        {name: parts for name, parts in modules.items() if not {"m", "D", "E"} & parts.keys()}
        if config.get("vera_d") is not None
        else {}
    )
    for module, parts in modules.items():
        if module not in shared:
            _read_module(module, parts, config, findings)
    findings.fault(rest.values(), "is not part of a LoRA of the adapters library")
    heads = [name for name in HEADS if view.has(name) and name not in waived.files]
    for name in heads:
        head = view.need(name).tensors.items()
        findings.changes += [Change(key, Full(tensor, copied=True, file=name)) for key, tensor in head]
    is_dora = bool(config.get("use_dora"))
    model = view.config.get("model_name")
    return findings.adapter(
        view,
        [*([CONFIG] if view.has(CONFIG) else []), *files, *heads],
        source,
        format=NAME,
        kind="DoRA" if is_dora else "LoRA",
        base=model if isinstance(model, str) and model else None,
        fit=follow if is_dora else None,
    )


def _refuse(config: Mapping[str, object], source: Source) -> None:
    """Raise UnsupportedError for a config that no weight equals, or that is not merged yet."""
    method = config.get("architecture", "lora")
    if method != "lora":
        raise UnsupportedError(f"The adapter {source.name} is of {method}, which adds modules to the model.")
    if config.get("use_gating"):
        raise UnsupportedError(f"The adapter {source.name} has gates that depend on the input (use_gating).")
    if config.get("composition_mode", "add") != "add":
        raise UnsupportedError(f"The adapter {source.name} scales activations (composition_mode): not merged yet.")


def _read_module(module: str, parts: Parts, config: Mapping[str, object], findings: Findings) -> None:
    """Turn the parts of one module into a change, or a fault."""
    if {"D", "E"} & parts.keys():
        findings.fault(parts.values(), "is of VeRA with full matrices, which is not merged yet")
    elif why := wrong_parts(parts, {"A", "B"}, ENDS):
        findings.fault(parts.values(), why)
    elif len(parts["A"].shape) != 2 or parts["A"].shape[0] != parts["B"].shape[1]:
        findings.fault(parts.values(), f"lora_A is {parts['A'].shape} and lora_B is {parts['B'].shape}")
    else:
        rank, alpha = parts["A"].shape[0], config.get("alpha", 8)
        number = float(alpha) if isinstance(alpha, int | float) else 8.0
        low = LowRank(parts["A"], parts["B"], number / rank)
        update: Update = Decomposed(low, parts["m"], norm_scale=1.0) if "m" in parts else low
        findings.changes.append(Change(f"{module}.weight", update, rule=f"alpha {number:g} / rank {rank}"))
