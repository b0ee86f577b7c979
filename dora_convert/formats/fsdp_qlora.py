"""Read the adapters of AnswerDotAI/fsdp_qlora: `model_state_dict.safetensors`, by the model's names, without a config.

The ends of names, for a weight of (out, in):

    .dora_layer.lora_A.weight (r, in)  .dora_layer.lora_B.weight (out, r)  .magnitude_layer.magnitude (out)   QDoRA
    .lora_AB.0.weight (r, in)          .lora_AB.1.weight (out, r)                                             LoRA
    .lora_A (r, in)                    .lora_B (out, r)                    .rescale (out)                     for vLLM

QDoRA has a scaling of 1, whatever alpha was, and its bias lies inside the norm: both weight and bias are multiplied
by m/‖V‖. `.rescale` is m/‖V‖ already. The custom LoRA has alpha/r, and its file lacks alpha.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..adapters import NOTHING, Adapter, Change, Decomposed, Full, LowRank, Update, Waived
from ..adapters.facts import Scaling
from ..adapters.parts import Findings, Parts, follow, sort_parts, wrong_parts
from ..storage.file_view import FileView
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor

NAME = "fsdp-qlora"
LIBRARY = "transformers"
TAKES = ("alpha", "scaling")
ENDS: Mapping[str, str] = {
    ".dora_layer.lora_A.weight": "A", ".dora_layer.lora_B.weight": "B", ".magnitude_layer.magnitude": "m",
    ".lora_AB.0.weight": "A'", ".lora_AB.1.weight": "B'", ".rescale": "rescale", ".lora_A": "A", ".lora_B": "B",
}  # fmt: skip
_MARKS = (".dora_layer.lora_A.weight", ".magnitude_layer.magnitude", ".lora_AB.0.weight", ".rescale")


def recognises(view: FileView) -> bool:
    """Return True for a file with the ends of fsdp_qlora's names."""
    return view.find(_is_fsdp) is not None


def _is_fsdp(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(name.endswith(_MARKS) for name in tensors)


def read(source: Source, waived: Waived = NOTHING) -> Adapter:
    """Read a file's header; UnsupportedError for a custom LoRA without alpha."""
    view = FileView.of(source.path)
    file = view.only(_is_fsdp, source.name)
    modules, rest = sort_parts(view.need(file).tensors, ENDS)
    findings, scaling = Findings(), Scaling(waived.facts, "fsdp_qlora", "16, with rank 64")
    for module, parts in modules.items():
        if why := wrong_parts(parts, {"A'", "B'"} if "A'" in parts else {"A", "B"}, ENDS):
            findings.fault(parts.values(), why)
        else:
            findings.changes += _changes(module, parts, scaling)
    findings.changes += [Change(name, Full(tensor)) for name, tensor in rest.items()]
    fit = follow if any(isinstance(change.update, Decomposed) for change in findings.changes) else None
    return findings.adapter(view, [file], source, format=NAME, kind="DoRA" if fit else "LoRA", fit=fit)


def _changes(module: str, parts: Parts, scaling: Scaling) -> list[Change]:
    """Return the change of a module's weight."""
    if "A'" in parts:
        scale, rule = scaling.of(parts["A'"].shape[0])
        return [Change(f"{module}.weight", LowRank(parts["A'"], parts["B'"], scale, transposed=False), rule=rule)]
    low, update, rule = LowRank(parts["A"], parts["B"], 1.0, transposed=False), None, "always 1"
    if "rescale" in parts:
        update = Decomposed(low, parts["rescale"], normalised=True)
    elif "m" in parts:
        update = Decomposed(low, parts["m"])
    chosen: Update = update or low
    return [Change(f"{module}.weight", chosen, rule=rule)]
