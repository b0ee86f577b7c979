"""Read models that were saved whole with a DoRA inside: catid/dora, rasbt/dora-from-scratch, NVlabs' VL-BART.

The file has every tensor of the model. A trained module has its old weight and its factors, for a weight of (out, in):

    catid, 2024    .weight         .m (1, in)         .lora_A (out, r)   .lora_B (r, in)   by columns, s = 1
    catid, 2026    .weight         .m (out, 1)        .lora_A (out, r)   .lora_B (r, in)   by rows, s = 1
    catid, 2026b   .weight         .m (out, 1)        .lora_A (r, in)    .lora_B (out, r)  experiments/adapters.py
    rasbt          .linear.weight  .m (1, in)         .lora.A (in, r)    .lora.B (r, out)  by columns, s = alpha
    VL-BART        .weight_v       .weight_m (out, 1) .lora_A (r, in)    .lora_B (out, r)  by rows, s = 1

rasbt's scaling is alpha itself, without a division by r, and the file lacks it. rasbt's first class has m as (1, out)
and divides by a norm of each sample, so no weight equals it. All other tensors replace the base's where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..adapters import NOTHING, Adapter, Change, Decomposed, Full, LowRank, Update, Waived
from ..adapters.facts import Scaling
from ..adapters.parts import Findings, Parts, sort_parts, turned, wrong_parts
from ..errors import Fault, RefError, UnsupportedError
from ..storage.file_view import FileView
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor

NAME = "whole-model-dora"
LIBRARY = "transformers"
TAKES = ("alpha", "scaling")
ENDS: Mapping[str, str] = {
    ".lora_A": "A", ".lora_B": "B", ".lora.A": "A'", ".lora.B": "B'", ".m": "m", ".weight_m": "m'",
    ".linear.weight": "W'", ".linear.bias": "b'", ".weight_v": "W",
}  # fmt: skip
CATID, RASBT, VL_BART = "catid/dora", "rasbt/dora-from-scratch", "NVlabs' VL-BART"


def recognises(view: FileView) -> bool:
    """Return True for a file with the factors of one of these programs."""
    return view.find(lambda tensors: _maker(tensors) is not None) is not None


def _maker(tensors: Mapping[str, StoredTensor]) -> str | None:
    """Return the program that wrote a file, by the ends of names."""
    for name in tensors:
        if name.endswith(".lora.A") and name.removesuffix(".lora.A") + ".linear.weight" in tensors:
            return RASBT
        if name.endswith(".weight_m") and f"{name[:-2]}_v" in tensors:
            return VL_BART
        if name.endswith(".m") and name.removesuffix(".m") + ".lora_A" in tensors:
            return CATID
    return None


def read(source: Source, waived: Waived = NOTHING) -> Adapter:
    """Read a file's header; UnsupportedError for rasbt's first class, and for rasbt's without alpha."""
    view = FileView.of(source.path)
    files = [name for name in view.candidates if _maker(view.tensors(name))]
    if len(files) > 1:
        raise RefError(f"{source.address} holds several models: {', '.join(files)}.", hint="name one of the files")
    tensors = view.need(files[0]).tensors
    maker = str(_maker(tensors))
    modules, rest = sort_parts(tensors, ENDS)
    findings, scaling = Findings(), Scaling(waived.facts, RASBT, "4, not divided by the rank")
    _refuse_unmergeable(modules, source)
    for module, parts in modules.items():
        needed = {"A'", "B'"} if maker == RASBT else {"A", "B"}
        if not needed & parts.keys():  # part of the model itself that has such a name
            findings.changes += [Change(part.name, Full(part, copied=True)) for part in parts.values()]
        elif why := wrong_parts(parts, needed, ENDS):
            findings.fault(parts.values(), why)
        else:
            _read_module(module, parts, scaling, findings)
    findings.changes += [Change(name, Full(tensor, copied=True)) for name, tensor in rest.items()]
    is_dora = any(isinstance(change.update, Decomposed) for change in findings.changes)
    return findings.adapter(view, files, source, format=NAME, maker=maker, kind="DoRA" if is_dora else "LoRA")


def _refuse_unmergeable(modules: Mapping[str, Parts], source: Source) -> None:
    """Raise UnsupportedError for rasbt's first class: m is as wide as the outputs, not as the inputs."""
    faults = [
        Fault(f"{module}.m", f"has shape {parts['m'].shape} for {parts['A' + chr(39)].shape[0]} inputs")
        for module, parts in modules.items()
        if "A'" in parts and "m" in parts and parts["m"].shape[-1] != parts["A'"].shape[0]
    ]
    if faults:
        raise UnsupportedError(
            f"{source.name} is of rasbt's LinearWithDoRA, which divides by a norm of each sample's output: "
            "no single weight equals it.",
            faults=faults,
            hint="train with LinearWithDoRAMerged",
        )


def _read_module(module: str, parts: Parts, scaling: Scaling, findings: Findings) -> None:
    """Add a module's old weight, its bias, and its DoRA or LoRA."""
    for part, leaf in (("W'", "weight"), ("b'", "bias"), ("W", "weight")):
        if part in parts:
            findings.changes.append(Change(f"{module}.{leaf}", Full(parts[part], copied=True)))
    if "A'" in parts:
        scale, rule = scaling.of(parts["A'"].shape[1], by_rank=False)
        low = LowRank(turned(parts["A'"]), turned(parts["B'"]), scale, transposed=False)
    else:
        scale, rule = 1.0, "always 1"
        low = LowRank(*_catid(parts["A"], parts["B"], parts.get("m")), 1.0, transposed=False)
    m = parts.get("m") or parts.get("m'")
    update: Update = low
    if m:
        columns = len(m.shape) == 2 and m.shape[0] == 1 and m.shape[1] != 1
        update = Decomposed(low, m, axis="columns" if columns else "rows")
    findings.changes.append(Change(f"{module}.weight", update, rule=rule))


def _catid(A: StoredTensor, B: StoredTensor, m: StoredTensor | None) -> tuple[StoredTensor, StoredTensor]:
    """Return A (r, in) and B (out, r): catid names them the other way round, VL-BART and later experiments do not."""
    outputs = m.shape[0] if m and len(m.shape) == 2 and m.shape[0] > 1 else None
    swapped = A.shape[1] == B.shape[0] and (A.shape[0] > A.shape[1] or A.shape[0] == outputs)
    return (B, A) if swapped else (A, B)
