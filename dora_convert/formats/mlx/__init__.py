"""Read mlx-lm's adapters: `adapters.safetensors` (or `adapters.npz`, before April 2024) and `adapter_config.json`.

The tensors of a module, for a weight of (out, in):

    .lora_a (in, r)       .lora_b (r, out)       Linear: both lie transposed; W + s·(ab)ᵀ
    .lora_a (tokens, r)   .lora_b (r, dim)       Embedding: W + s·ab
    .lora_a (E, r, in)    .lora_b (E, out, r)    the E experts of a SwitchLinear
    .m (out)                                     DoRA, by rows; of an embedding by tokens

The scaling is `scale` of `lora_parameters`, times alpha/rank if there is an alpha. The first releases wrote no config.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

from ...adapters import NOTHING, Adapter, Change, Decomposed, Full, LowRank, Update, Waived
from ...adapters.facts import Scaling
from ...adapters.parts import Findings, Parts, is_embedding, item_of, sort_parts, turned, wrong_parts
from ...errors import RefError, UnsupportedError
from ...storage.file_view import CONFIG, FileView
from ...storage.refs import Source
from ...storage.safetensors import StoredTensor

if TYPE_CHECKING:
    from ...adapters.new_adapter import Writer

NAME = LIBRARY = "mlx"
TAKES = ("scaling",)
ENDS: Mapping[str, str] = {".lora_a": "a", ".lora_b": "b", ".m": "m"}
FILES = ("adapters.safetensors", "adapters.npz")
_CHECKPOINT = re.compile(r"\d+_adapters\.(safetensors|npz)")
EXPERTS = {
    "block_sparse_moe.switch_mlp": (
        "block_sparse_moe.experts",
        {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    ),
    "mlp.switch_mlp": ("mlp.experts", {}),
}
"""mlx-lm's module of all experts, the Hub's module of one, and the names inside that differ."""


def recognises(view: FileView) -> bool:
    """Return True for mlx-lm's config, or tensors of its form."""
    config = view.config
    named = any(name in FILES or _CHECKPOINT.fullmatch(name) for name in view.names)
    if named and ("fine_tune_type" in config or "lora_parameters" in config or "lora_layers" in config):
        return True
    return view.find(_is_mlx) is not None


def _is_mlx(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(name.endswith(".lora_a") for name in tensors) and any(name.endswith(".lora_b") for name in tensors)


def read(source: Source, waived: Waived = NOTHING) -> Adapter:
    """Read the config and the headers; UnsupportedError without a config, unless the caller gives the scaling."""
    view = FileView.of(source.path)
    file = _file(view, source)
    header, config = view.need(file), view.config
    findings = Findings()
    modules, rest = sort_parts(header.tensors, ENDS)
    kind = str(config.get("fine_tune_type", "lora"))
    scaling = _Scale(config, waived)
    for module, parts in modules.items():
        _read_module(module, parts, scaling, findings)
    for name, tensor in rest.items():
        if kind == "full":
            findings.changes.append(Change(name, Full(tensor)))
        else:
            findings.fault([tensor], "is not part of a LoRA of mlx-lm's form")
    is_dora = any(isinstance(change.update, Decomposed) for change in findings.changes)
    model = config.get("model")
    return findings.adapter(
        view,
        [*([CONFIG] if config else []), file],
        source,
        format=NAME,
        kind="full" if kind == "full" else "DoRA" if is_dora else "LoRA",
        base=model if isinstance(model, str) and model else None,
    )


def _file(view: FileView, source: Source) -> str:
    """Return the file with the tensors: the last one that was written, or the only one of another name."""
    usual = [name for name in FILES if name in view.names]
    if usual:
        return usual[0]
    if not view.find(_is_mlx):
        raise RefError(f"ADAPTER {source.address} has mlx-lm's config, and no {FILES[0]}.")
    return view.only(_is_mlx, source.name)


class _Scale:
    """Computes the scaling of modules from `lora_parameters`."""

    def __init__(self, config: Mapping[str, object], waived: Waived) -> None:
        given = config.get("lora_parameters")
        self._fields: Mapping[str, object] = given if isinstance(given, dict) else {}
        self._asked = Scaling(waived.facts, "mlx-lm without a config", "20", alpha=False)

    def of(self, rank: int) -> tuple[float, str]:
        """Return s and its rule."""
        scale, alpha = self._fields.get("scale"), self._fields.get("alpha")
        if not isinstance(scale, int | float):
            return self._asked.of(rank)
        if not isinstance(alpha, int | float):
            return float(scale), f"scale {scale:g}"
        total = self._fields.get("rank", rank)
        number = total if isinstance(total, int) and total else rank
        return scale * alpha / number, f"scale {scale:g} · alpha {alpha:g} / rank {number}"


def _read_module(module: str, parts: Parts, scaling: _Scale, findings: Findings) -> None:
    """Turn the parts of one module into changes, or a fault."""
    if why := wrong_parts(parts, {"a", "b"}, ENDS):
        findings.fault(parts.values(), why)
        return
    a, b = parts["a"], parts["b"]
    if len(a.shape) == 3:
        findings.changes += _experts(module, parts, scaling)
        return
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
        findings.fault(parts.values(), f"lora_a is {a.shape} and lora_b is {b.shape}: not factors of one matrix")
        return
    scale, rule = scaling.of(a.shape[1])
    pair = (b, a) if is_embedding(module) else (turned(a), turned(b))
    low = LowRank(*pair, scale, transposed=False if is_embedding(module) else None)
    update: Update = Decomposed(low, parts["m"]) if "m" in parts else low
    findings.changes.append(Change(f"{module}.weight", update, rule=rule))


def _experts(module: str, parts: Parts, scaling: _Scale) -> Iterator[Change]:
    """Yield the changes of the experts in a SwitchLinear."""
    a, b = parts["a"], parts["b"]
    if "m" in parts or a.shape[0] != b.shape[0]:
        raise UnsupportedError(f"{module} is not a SwitchLinear of mlx-lm's form: {a.shape}, {b.shape}.")
    outer, _, leaf = module.rpartition(".")
    scale, rule = scaling.of(a.shape[1])
    for end, (experts, names) in EXPERTS.items():
        if outer.endswith(end):
            outer, leaf = outer.removesuffix(end) + experts, names.get(leaf, leaf)
            break
    for number in range(a.shape[0]):
        low = LowRank(item_of(a, number), item_of(b, number), scale, transposed=False)
        yield Change(f"{outer}.{number}.{leaf}.weight", low, rule=rule)


def writer() -> Writer:
    """Return what writes the format. A merge never imports it."""
    from . import write

    return cast("Writer", write)
