"""Read microsoft/LoRA's files, which `loralib.lora_state_dict` makes: bare `.lora_A` and `.lora_B`, without a config.

For a weight of (out, in):

    .lora_A (r, in)      .lora_B (out, r)              Linear; GPT-2's Conv1D as well
    .lora_A (r, rows)    .lora_B (dim, r)              Embedding: (BA)ᵀ is added
    .lora_A (r·n, in)    .lora_B (out·n/len, r)        MergedLinear: n of `len` equal blocks of outputs have factors

The scaling is alpha/r, and the file lacks alpha. Of a MergedLinear it lacks the list of blocks, too. Training scripts
may wrap the tensors in `model_state_dict`. Biases are saved whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..adapters import NOTHING, Adapter, Change, Full, LowRank, Waived
from ..adapters.facts import Scaling
from ..adapters.parts import Findings, Parts, is_embedding, rows_of, sort_parts, wrong_parts
from ..errors import UnsupportedError
from ..settings import AdapterFacts
from ..storage.file_view import FileView
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor

NAME = LIBRARY = "loralib"
TAKES = ("alpha", "scaling", "enable_lora")
ENDS: Mapping[str, str] = {".lora_A": "A", ".lora_B": "B"}


def recognises(view: FileView) -> bool:
    """Return True for a file with bare factors."""
    return view.find(_is_loralib) is not None


def _is_loralib(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(name.endswith(".lora_A") and f"{name[:-1]}B" in tensors for name in tensors)


def read(source: Source, waived: Waived = NOTHING) -> Adapter:
    """Read a file's header; UnsupportedError without alpha, and without --enable-lora for a MergedLinear."""
    view = FileView.of(source.path)
    file = view.only(_is_loralib, source.name)
    modules, rest = sort_parts(view.need(file).tensors, ENDS)
    findings, scaling = Findings(), Scaling(waived.facts, "loralib", "1; its examples have 16 and 32")
    for module, parts in modules.items():
        if why := wrong_parts(parts, {"A", "B"}, ENDS):
            findings.fault(parts.values(), why)
        elif len(parts["A"].shape) != 2 or len(parts["B"].shape) != 2 or parts["A"].shape[0] % parts["B"].shape[1]:
            findings.fault(parts.values(), f"lora_A is {parts['A'].shape} and lora_B is {parts['B'].shape}")
        else:
            findings.changes += _changes(module, parts, scaling, waived.facts)
    for name, tensor in rest.items():
        if name.endswith(".bias"):
            findings.changes.append(Change(name, Full(tensor)))
        else:
            findings.fault([tensor], "is not part of a LoRA of loralib's form")
    return findings.adapter(view, [file], source, format=NAME, kind="LoRA")


def _changes(module: str, parts: Parts, scaling: Scaling, facts: AdapterFacts) -> Iterator[Change]:
    """Yield the change of a Linear or an Embedding, or one for each block of a MergedLinear that has factors."""
    A, B = parts["A"], parts["B"]
    rank, count = B.shape[1], A.shape[0] // B.shape[1]
    scale, rule = scaling.of(rank)
    if count == 1 and not facts.enable_lora:
        low = LowRank(A, B, scale, transposed=True if is_embedding(module) else None)
        yield Change(f"{module}.weight", low, rule=rule)
        return
    enabled = facts.enable_lora
    if enabled and sum(enabled) != count:
        if count == 1:
            yield Change(f"{module}.weight", LowRank(A, B, scale), rule=rule)
            return
        raise UnsupportedError(f"{module} has factors for {count} blocks; --enable-lora names {sum(enabled)}.")
    if not enabled:
        raise UnsupportedError(
            f"{module} is of loralib's MergedLinear, with factors for {count} blocks, and its file does not say which.",
            hint="--enable-lora, as in training: true,false,true for GPT-2's query and value",
        )
    height, block = B.shape[0] // count, 0
    for number, is_enabled in enumerate(enabled):
        if is_enabled:
            low = LowRank(
                rows_of(A, block * rank, (block + 1) * rank), rows_of(B, block * height, (block + 1) * height), scale
            )
            outputs = (number * height, (number + 1) * height)
            yield Change(f"{module}.weight", low, rule=rule, outputs=outputs)
            block += 1
