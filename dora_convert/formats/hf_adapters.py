"""Read the adapters of AdapterHub's `adapters` library: LoRA, DoRA, VeRA and DVoRA by its own config.

`adapter_config.json` has `config.architecture` and `version`; the tensors lie in `pytorch_adapter.bin` or
`adapter.safetensors`. A trained head may lie in `pytorch_model_head.bin`. The tensors of a module, named
`<module>.loras.<adapter>` and an end:

    .lora_A (r, in)   .lora_B (out, r)   .m.weight (out, 1)      LoRA, DoRA
    .vera_D (r, r)    .vera_B (out, out)                         VeRA; with .m.weight, DVoRA

The norm of a DoRA is that of W + BA, without the scaling: W' = m/‖W + BA‖·(W + sBA). The bias is multiplied, too.
VeRA has vera_B·lora_B·vera_D·lora_A for BA. All modules share lora_A and lora_B, which are named
`<model>.shared_parameters.<adapter>.lora_A`. vera_D and vera_B start as diagonals, and are trained as whole matrices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

from ..adapters import NOTHING, Adapter, Change, Decomposed, Full, LowRank, Transform, Update, Waived
from ..adapters.facts import Scaling
from ..adapters.parts import Findings, Parts, follow, sort_parts, wrong_parts
from ..errors import MalformedError, UnsupportedError
from ..storage.file_view import CONFIG, FileView
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor

NAME = "hf-adapters"
LIBRARY = "adapters"
TAKES = ("alpha", "scaling")
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
ENDS: Mapping[str, str] = {
    ".lora_A": "A", ".lora_B": "B", ".m.weight": "m", ".vera_D": "D", ".vera_B": "E", ".gate.weight": "gate",
    ".gate.bias": "gate_bias",
}  # fmt: skip
_MARK = re.compile(r"\.loras\.[^.]+\.")
_SHARED = re.compile(r"(?:^|\.)shared_parameters\.[^.]+\.(lora_[AB])$")
_PRODUCT = (("vera_B", "E"), ("lora_B", "B"), ("vera_D", "D"), ("lora_A", "A"))
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
        raise MalformedError(
            f"ADAPTER {source.address} has {CONFIG} but no {WEIGHTS[0]}.", hint="put its weights beside it"
        )
    tensors = view.need(files[0]).tensors
    if any(_OTHER.search(name) for name in tensors):
        raise UnsupportedError(f"The adapter {source.name} adds modules to the model, so no single weight equals it.")
    common = {name: tensor for name, tensor in tensors.items() if _SHARED.search(name)}
    own = {_MARK.sub(".", name): tensor for name, tensor in tensors.items() if name not in common}
    modules, rest = sort_parts(own, ENDS)
    findings, scaling = Findings(), Scaling(waived.facts, "AdapterHub without adapter_config.json", "8")
    is_vera = _share(modules, common, findings, source)
    for module, parts in modules.items():
        if update := _read_module(parts, config, findings, scaling):
            findings.changes.append(Change(f"{module}.weight", update[0], rule=update[1]))
    findings.fault(rest.values(), "is not part of a LoRA of the adapters library")
    heads = [name for name in HEADS if view.has(name) and name not in waived.files]
    for name in heads:
        head = view.need(name).tensors.items()
        findings.changes += [Change(key, Full(tensor, copied=True, file=name)) for key, tensor in head]
    is_dora = any(isinstance(change.update, Decomposed) for change in findings.changes)
    model = view.config.get("model_name")
    return findings.adapter(
        view,
        [*([CONFIG] if view.has(CONFIG) else []), *files, *heads],
        source,
        format=NAME,
        kind=("DVoRA" if is_dora else "VeRA") if is_vera else "DoRA" if is_dora else "LoRA",
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


def _share(
    modules: Mapping[str, Parts], common: Mapping[str, StoredTensor], findings: Findings, source: Source
) -> bool:
    """Give the shared A and B to each module of VeRA, and return True if there is one.

    Raises UnsupportedError if the file lacks them: `save_adapter` leaves them out if their names have no prefix, as in
    T5 and in models without a head.
    """
    owners: dict[str, Parts] = {}
    for name, tensor in common.items():
        mark = _SHARED.search(name)
        assert mark
        owners.setdefault(name[: mark.start()], {})[mark[1].removeprefix("lora_")] = tensor
    used = set()
    for module, parts in modules.items():
        if {"D", "E"} & parts.keys():
            above = [owner for owner in owners if f"{module}.".startswith(f"{owner}." if owner else "")]
            if not above:
                raise UnsupportedError(
                    f"The adapter {source.name} is a VeRA, and the file lacks its shared lora_A and lora_B.",
                    hint="save_adapter leaves both out for T5 and headless models: add them from model.state_dict()",
                )
            used.add(nearest := max(above, key=len))
            parts |= {part: tensor for part, tensor in owners[nearest].items() if part not in parts}
    for owner in owners.keys() - used:
        findings.fault(owners[owner].values(), "is shared, but no module of VeRA uses it")
    return bool(used)


def _read_module(
    parts: Parts, config: Mapping[str, object], findings: Findings, scaling: Scaling
) -> tuple[Update, str] | None:
    """Return the update of one module's parts and the rule of its scaling; a fault and None if they make none."""
    needed = ("ADEB" if {"D", "E"} & parts.keys() else "AB") + ("m" if config.get("use_dora") else "")
    alpha = config.get("alpha", 8 if config else None)
    why = wrong_parts(parts, needed, ENDS) or _wrong_shapes(parts)
    if alpha is not None and not isinstance(alpha, int | float):
        why = f"has the alpha {alpha!r}"
    if why:
        findings.fault(parts.values(), why)
        return None
    scale, rule = scaling.of(parts["A"].shape[0], alpha)  # type: ignore[arg-type] # checked above
    inner = _product(parts, scale)
    return (Decomposed(inner, parts["m"], norm_scale=1.0) if "m" in parts else inner), rule


def _wrong_shapes(parts: Parts) -> str | None:
    """Return why the matrices of one module have no product, in the order E·B·D·A; None if they have one."""
    chain = [(name, parts[part].shape) for name, part in _PRODUCT if part in parts]
    if any(len(shape) != 2 for _, shape in chain) or any(a[1] != b[0] for (_, a), (_, b) in pairwise(chain)):
        return " and ".join(f"{name} is {shape}" for name, shape in chain)
    return None


def _product(parts: Parts, scale: float) -> Transform:
    """Return BA, or VeRA's product of four matrices."""
    if "E" not in parts:
        return LowRank(parts["A"], parts["B"], scale)
    from ..adapters.kinds import Computed

    shape = (parts["E"].shape[0], parts["A"].shape[1])
    return Computed("VeRA with matrices", tuple((part, parts[part]) for part in "EBDA"), scale, shape=shape)
