"""Whether an update fits the tensor it is for, and which way round: by shapes, and by tables where shapes do not tell."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..adapters.updates import Decomposed, Delta, Full, LowRank, Rows, Start, Update, low_rank
from ..storage.safetensors import FLOATS, StoredTensor

CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
"""Where transformers uses its Conv1D, whose weight is (in, out): needed for square weights, which do not tell."""
TURNED_EXPERTS = frozenset({"gpt_oss", "openai_privacy_filter", "aria"})
"""Models whose experts are (in, out) and say so (`is_transposed` in transformers)."""


@dataclass(frozen=True)
class Mismatch:
    """Why an update does not go with a tensor."""

    why: str


@dataclass(frozen=True)
class Match:
    """An update that fits, as it fits, and whether its tensor is stored as (in, out)."""

    update: Update
    transposed: bool = False


def fit(
    update: Update, name: str, shape: tuple[int, ...], dtype: str, model_types: frozenset[str]
) -> Match | Mismatch:
    """How an update goes with a tensor of the output, given by its name, shape and dtype."""
    if dtype not in FLOATS and not (isinstance(update, Full) and update.value.dtype == dtype):
        return Mismatch(f"{name} is stored as {dtype}; quantised weights are not merged yet")
    match update:
        case Full(value):
            return _fit_full(update, value, name, shape, dtype)
        case Rows(value, index):
            return _fit_rows(update, value, index, name, shape)
        case Delta(value):
            same = value.shape == shape
            return Match(update) if same else Mismatch(f"has shape {value.shape}; {name} has {shape}")
        case LowRank() | Decomposed():
            return _fit_low_rank(update, name, shape, model_types)


def _fit_full(
    update: Full, value: StoredTensor, name: str, shape: tuple[int, ...], dtype: str
) -> Match | Mismatch:
    if value.dtype not in FLOATS and value.dtype != dtype:
        return Mismatch(f"is saved as {value.dtype}, but {name} is {dtype}")
    return Match(update) if value.shape == shape else Mismatch(f"has shape {value.shape}; {name} has {shape}")


def _fit_rows(
    update: Rows, value: StoredTensor, index: tuple[int, ...], name: str, shape: tuple[int, ...]
) -> Match | Mismatch:
    if value.dtype not in FLOATS or value.shape != (len(index), *shape[1:]):
        return Mismatch(f"has shape {value.shape} for {len(index)} rows of {name}, which has {shape}")
    if beyond := [row for row in index if row >= shape[0]]:
        return Mismatch(f"is for row {beyond[0]}; {name} has {shape[0]}")
    return Match(update)


def _fit_low_rank(
    update: LowRank | Decomposed, name: str, shape: tuple[int, ...], model_types: frozenset[str]
) -> Match | Mismatch:
    """Match factor shapes to the stored weight; square weights are told apart by the model's type."""
    low = low_rank(update)
    if len(shape) == 3 and len(low.A.shape) == len(low.B.shape) == 2:
        return _fit_experts(update, replace(low, experts=low.experts or 1), shape, model_types)
    if low.experts > 1:
        return Mismatch(f"is for {low.experts} experts; {name} has shape {shape}")
    if isinstance(update, Decomposed) and update.m.numel != low.outputs:
        return Mismatch(f"its magnitude has {update.m.numel} elements for {low.outputs} outputs")
    wide = len(low.inputs) == 1 < len(shape) - 1  # AdaLoRA keeps a convolution's A flat
    straight = _flat(shape) == (low.outputs, *low.inputs) if wide else shape == (low.outputs, *low.inputs)
    straight = straight and low.B.shape[2:] == (1,) * (len(low.A.shape) - 2)
    turned = len(low.A.shape) == len(low.B.shape) == 2 and shape == (*low.inputs, low.outputs)
    if low.transposed is not None:
        straight, turned = straight and not low.transposed, turned and low.transposed
    if straight and turned:
        turned = is_conv1d(name, model_types)
        straight = not turned
    if turned and low.start in (Start.OLORA, Start.KASA):
        return Mismatch(f"{low.start.value} does not work on weights stored as (in, out)")
    if straight or turned:
        return Match(update, transposed=turned)
    return Mismatch(f"lora_A {low.A.shape} and lora_B {low.B.shape} do not make its weight of shape {shape}")


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    inputs = 1
    for size in shape[1:]:
        inputs *= size
    return shape[0], inputs


def _fit_experts(
    update: LowRank | Decomposed, low: LowRank, shape: tuple[int, ...], model_types: frozenset[str]
) -> Match | Mismatch:
    """Factors of all experts at once, on one tensor of three dimensions."""
    if isinstance(update, Decomposed) or low.start or low.d or low.blocks != (1, 1):
        return Mismatch("only plain LoRA is trained on experts")
    count, rows, columns = shape
    straight = (low.outputs, *low.inputs) == (rows, columns)
    turned = (*low.inputs, low.outputs) == (rows, columns)
    if count != low.experts or not (straight or turned):
        return Mismatch(
            f"lora_A {low.A.shape} and lora_B {low.B.shape} do not make its weight of shape {shape}"
        )
    if straight and turned:
        turned = low.square[0 if model_types & TURNED_EXPERTS else 1]
    return Match(low, transposed=turned)


def is_conv1d(tensor: str, model_types: frozenset[str]) -> bool:
    """Whether transformers keeps a weight as Conv1D, by the model's type and the module's name."""
    return (
        bool(model_types & CONV1D_MODELS) and tensor.rpartition(".")[0].rpartition(".")[2] in CONV1D_MODULES
    )
