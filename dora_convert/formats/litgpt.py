"""Read LitGPT's LoRA: `lit_model.pth.lora` with `hyperparameters.yaml` and `model_config.yaml`.

The tensors of a module, in a dict under the key `model`, for a weight of (out, in):

    .lora_A (r·n, in)    .lora_B (out of the n enabled parts, r)

`attn.qkv` has n of the parts q, k, v, one after the other in B's rows and A's rows; with grouped queries they differ
in size. All other modules have n = 1. The scaling is alpha/r.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ..adapters import NOTHING, Adapter, Change, LowRank, Waived
from ..adapters.facts import Scaling
from ..adapters.parts import Findings, Parts, rows_of, sort_parts, wrong_parts
from ..errors import MalformedError, UnsupportedError
from ..storage.file_view import FileView
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor

NAME = LIBRARY = "litgpt"
TAKES = ("alpha", "scaling")
FILE = "lit_model.pth.lora"
HYPERPARAMETERS, MODEL = "hyperparameters.yaml", "model_config.yaml"
ENDS: Mapping[str, str] = {".lora_A": "A", ".lora_B": "B"}
_MARK = re.compile(r"(^|\.)transformer\.h\.\d+\.attn\.(qkv|attn)\.lora_[AB]$")
MODULES = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj"}
MODULES |= {"mlp.proj": "mlp.down_proj"}
"""LitGPT's names inside a layer of Llama's kind, and those of the Hub."""
LLAMA = ("LLaMAMLP", "GemmaMLP")
PARTS = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))


def recognises(view: FileView) -> bool:
    """Return True for LitGPT's file, by its name or its names of tensors."""
    return FILE in view.names or view.find(lambda tensors: any(_MARK.search(name) for name in tensors)) is not None


def read(source: Source, waived: Waived = NOTHING) -> Adapter:
    """Read the tensors, and both yaml files beside them.

    Raises MalformedError without model_config.yaml, UnsupportedError for models of another kind than Llama's.
    """
    view = FileView.of(source.path)
    file = FILE if FILE in view.names else view.candidates[0]
    chosen, model = read_yaml(view, HYPERPARAMETERS), read_yaml(view, MODEL)
    modules, rest = sort_parts(view.need(file).tensors, ENDS)
    findings = Findings()
    alpha = chosen.get("lora_alpha")
    scaling = Scaling(waived.facts, "LitGPT without hyperparameters.yaml", "16, with rank 8")
    for module, parts in modules.items():
        if why := wrong_parts(parts, {"A", "B"}, ENDS):
            findings.fault(parts.values(), why)
            continue
        scale, rule = scaling.of(parts["B"].shape[1], float(alpha) if alpha else None)
        for target, A, B in _placed(module, parts, chosen, model):
            findings.changes.append(Change(f"{target}.weight", LowRank(A, B, scale, transposed=False), rule=rule))
    findings.fault(rest.values(), "is not part of a LoRA of LitGPT's form")
    files = [name for name in (HYPERPARAMETERS, MODEL) if view.has(name)]
    return findings.adapter(
        view, [*files, file], source, format=NAME, kind="LoRA", base=_base(chosen.get("checkpoint_dir"))
    )


def _base(folder: str | None) -> str | None:
    """Return the repo id in a folder such as checkpoints/org/name."""
    parts = (folder or "").strip("/").split("/")
    return "/".join(parts[-2:]) if len(parts) > 1 else None


def read_yaml(view: FileView, name: str) -> dict[str, str]:
    """Return the plain values at the top of a yaml file; empty if it does not exist."""
    if not view.folder or not view.has(name):
        return {}
    text = view.path(name).read_bytes()[: 1 << 16].decode(errors="replace")
    lines = (re.fullmatch(r"(\w+):\s*([^#]*?)\s*(#.*)?", line) for line in text.splitlines())
    return {line[1]: line[2].strip("'\"") for line in lines if line and line[2]}


def _placed(
    module: str, parts: Parts, chosen: Mapping[str, str], model: Mapping[str, str]
) -> Iterator[tuple[str, StoredTensor, StoredTensor]]:
    """Yield the Hub's module, A and B of each part of a module."""
    if module.endswith("lm_head"):
        yield "lm_head", parts["A"], parts["B"]
        return
    match = re.search(r"transformer\.h\.(\d+)\.(.+)$", module)
    if not match or (match[2] not in MODULES and match[2] not in ("attn.qkv", "attn.attn")):
        raise UnsupportedError(f"{module} is not of a model of Llama's kind: others of LitGPT's are not merged yet.")
    layer = f"model.layers.{match[1]}"
    if model.get("mlp_class_name", LLAMA[0]) not in LLAMA:
        raise UnsupportedError(f"LitGPT's {model['mlp_class_name']} is not merged yet: models of Llama's kind are.")
    if match[2] in MODULES:
        yield f"{layer}.{MODULES[match[2]]}", parts["A"], parts["B"]
        return
    if match[2] == "attn.attn" and all(_is_enabled(chosen, part) for part, _ in PARTS):
        raise UnsupportedError(
            "LitGPT before December 2024 added q, k and v to interleaved rows if all were trained: not merged yet."
        )
    yield from _split(f"{layer}.self_attn", parts, chosen, model)


def _is_enabled(chosen: Mapping[str, str], part: str) -> bool:
    return chosen.get(f"lora_{part}", "false" if part == "key" else "true").lower() == "true"


def _split(
    attention: str, parts: Parts, chosen: Mapping[str, str], model: Mapping[str, str]
) -> Iterator[tuple[str, StoredTensor, StoredTensor]]:
    """Yield q, k and v, as far as they are enabled: rows of A and rows of B."""
    try:
        heads, size = int(model["n_head"]), int(model.get("head_size") or int(model["n_embd"]) // int(model["n_head"]))
        groups = int(model.get("n_query_groups") or heads)
    except (KeyError, ValueError) as error:
        raise MalformedError(
            f"{MODEL} beside LitGPT's adapter must say n_head, n_query_groups and head_size."
        ) from error
    sizes = {"query": heads * size, "key": groups * size, "value": groups * size}
    enabled = [(part, leaf) for part, leaf in PARTS if _is_enabled(chosen, part)]
    A, B = parts["A"], parts["B"]
    rank = B.shape[1]
    if A.shape[0] != rank * len(enabled) or B.shape[0] != sum(sizes[part] for part, _ in enabled):
        raise MalformedError(
            f"{A.name} is {A.shape} and {B.name} is {B.shape}: {HYPERPARAMETERS} and {MODEL} say otherwise."
        )
    row = 0
    for number, (part, leaf) in enumerate(enabled):
        yield (
            f"{attention}.{leaf}",
            rows_of(A, number * rank, (number + 1) * rank),
            rows_of(B, row, row := row + sizes[part]),
        )
