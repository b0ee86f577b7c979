"""Read the adapters of NVlabs/DoRA, by the authors of DoRA: a fork of PEFT with `peft_type` DORA.

Names are `base_model.model.<module>` and an end, for a weight of (out, in):

    .lora_A.weight (r, in)   .lora_B.weight (out, r)   .weight_m_wdecomp.weight (out, 1)

A module with `weight_m_wdecomp` alone has trained magnitudes and no factors: W' = m·W/‖W‖ (the paper's section 5.6).
The scaling is alpha/r. The LLaVA recipe leaves the magnitudes in `non_lora_trainables.bin`, with `.default` in their
names, beside other trained weights; its own loader loses them there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..adapters import NOTHING, Adapter, Change, Decomposed, Full, LowRank, Waived
from ..adapters.facts import Scaling
from ..adapters.parts import Findings, Parts, sort_parts, wrong_parts
from ..errors import MalformedError
from ..storage.file_view import CONFIG, FileView
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor

NAME = "nvlabs"
LIBRARY = "peft"
TAKES = ("alpha", "scaling")
ENDS: Mapping[str, str] = {".lora_A.weight": "A", ".lora_B.weight": "B", ".weight_m_wdecomp.weight": "m"}
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
BESIDE = "non_lora_trainables.bin"
PREFIX = "base_model.model."
_DEFAULT = re.compile(r"\.default(?=\.weight$)")


def recognises(view: FileView) -> bool:
    """Return True for the fork's config, or for its magnitudes in a file."""
    return view.config.get("peft_type") == "DORA" or view.find(_is_nvlabs) is not None


def _is_nvlabs(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(".weight_m_wdecomp." in name for name in tensors)


def read(source: Source, waived: Waived = NOTHING) -> Adapter:
    """Read the config and the headers of both files."""
    view = FileView.of(source.path)
    if view.lone and view.folder and view.config.get("peft_type") == "DORA":
        view = FileView.of(view.folder)
    files = [name for name in WEIGHTS if view.has(name)][:1]
    files = files or [name for name in view.candidates if _is_nvlabs(view.tensors(name)) and name != BESIDE][:1]
    if not files and not view.has(BESIDE):
        raise MalformedError(
            f"ADAPTER {source.address} has {CONFIG} but no {WEIGHTS[0]}.", hint="put its weights beside it"
        )
    files += [BESIDE] if view.has(BESIDE) and BESIDE not in waived.files else []
    tensors: dict[str, StoredTensor] = {}
    origins: dict[str, str] = {}
    for file in files:
        for name, tensor in view.need(file).tensors.items():
            plain = _DEFAULT.sub("", name).removeprefix(PREFIX)
            tensors[plain], origins[plain] = tensor, file
    modules, rest = sort_parts(tensors, ENDS)
    findings = Findings()
    _read_modules(modules, view.config, Scaling(waived.facts, "this file", "twice the rank"), findings)
    for name, tensor in rest.items():
        beside = BESIDE if origins[name] == BESIDE else ""
        findings.changes.append(
            Change(name.replace(".base_layer.", "."), Full(tensor, may_add=bool(beside), file=beside))
        )
    base = view.config.get("base_model_name_or_path")
    return findings.adapter(
        view,
        [*([CONFIG] if view.has(CONFIG) else []), *files],
        source,
        format=NAME,
        kind="DoRA",
        base=base if isinstance(base, str) and base else None,
    )


def _read_modules(
    modules: Mapping[str, Parts], config: Mapping[str, object], scaling: Scaling, findings: Findings
) -> None:
    """Turn the parts of each module into a change, or a fault."""
    known = config.get("lora_alpha")
    alpha = float(known) if isinstance(known, int | float) else None
    for module, parts in modules.items():
        alone = set(parts) == {"m"}
        if why := wrong_parts(parts, {"m"} if alone else {"A", "B"}, ENDS):
            findings.fault(parts.values(), why)
        elif alone:
            findings.changes.append(Change(f"{module}.weight", Decomposed(None, parts["m"]), rule="magnitudes alone"))
        elif len(parts["A"].shape) != 2 or len(parts["B"].shape) != 2:
            findings.fault(parts.values(), "is of a MergedLinear, which the fork itself cannot merge")
        elif parts["A"].shape[0] != parts["B"].shape[1]:
            findings.fault(parts.values(), f"lora_A is {parts['A'].shape} and lora_B is {parts['B'].shape}")
        else:
            scale, rule = scaling.of(parts["A"].shape[0], alpha)
            low = LowRank(parts["A"], parts["B"], scale)
            update = Decomposed(low, parts["m"]) if "m" in parts else low
            findings.changes.append(Change(f"{module}.weight", update, rule=rule))
