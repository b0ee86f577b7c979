"""Say which programs load a checkpoint as it is, how its weights are coded, and how many there are when decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...errors import DoraConvertError
from ...reports.advice import LoaderAdvice
from ...storage.checkpoint import Checkpoint

SERVED = frozenset(
    {"fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "modelopt", "torchao", "mxfp4", "fbgemm_fp8", "quark"}
)
"""Methods of quantisation that servers decode."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
PROGRAMS = {
    "transformers": "transformers/modeling_utils.py",
    "vLLM": "vllm/model_executor/model_loader/default_loader.py",
    "SGLang": "sglang/srt/model_loader/loader.py",
    "llama.cpp": "llama.cpp/convert_hf_to_gguf.py",
    "MLX": "mlx_lm/utils.py",
}
"""The programs and the file that each verdict rests on."""


def advise_on_checkpoint(base: Checkpoint, quantised: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the report's fields of advice."""
    coded = _coded(base) if base.may_be_quantised else {}
    dense = _dense_parameters(base, coded)
    kinds = Counter(tensor.scheme.title for tensor in coded.values())
    return {
        "dense_parameters": dense,
        "coded": {title: {"tensors": count} for title, count in kinds.items()},
        "loaders": tuple(_verdicts(base, quantised)),
    }


def _coded(base: Checkpoint) -> dict[str, Any]:
    """Return the coded tensors by their dense names; none if their kind is refused."""
    from ...codecs.detect import find_coded

    try:
        return dict(find_coded(base))
    except DoraConvertError:
        return {}


def _dense_parameters(base: Checkpoint, coded: Mapping[str, Any]) -> int:
    """Return the number of weights when decoded; tensors under two names count once."""
    parts = {part.name for tensor in coded.values() for part in tensor.parts.values()}
    plain = {(t.path, t.start): t.numel for name, t in base.tensors.items() if name not in parts}
    decoded: int = sum(tensor.numel for tensor in coded.values())
    return sum(plain.values()) + decoded


def _verdicts(base: Checkpoint, quantised: Mapping[str, Any] | None) -> Iterator[LoaderAdvice]:
    """Yield each program's verdict."""
    lacking = list(_lacking(base))
    for loader, source in PROGRAMS.items():
        against = [*lacking, *_objections(loader, base, quantised)]
        why = against or list(_conditions(loader, base))
        verdict = "no" if against else "yes"
        yield LoaderAdvice(loader=loader, verdict=verdict, why="; ".join(why), source=source, command=None)


def _objections(loader: str, base: Checkpoint, quantised: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield why a program does not load the files."""
    names = [shard.filename for shard in base.shards]
    if loader == "MLX" and not all(name.endswith(".safetensors") for name in names):
        yield "reads safetensors only"
    if loader == "MLX" and any(not name.startswith("model") for name in names):
        yield "reads files named model*.safetensors only"
    if quantised and (objection := _objection(loader, str(quantised["method"]), base)):
        yield objection


def _conditions(loader: str, base: Checkpoint) -> Iterator[str]:
    """Yield what a program that loads the files needs for it."""
    if base.gguf:
        if loader == "vLLM":
            yield "with its package vllm-gguf-plugin, from one file, and with --tokenizer of the original"
        return
    if loader == "llama.cpp":
        yield "by its convert_hf_to_gguf.py"
    if loader in {"vLLM", "SGLang", "llama.cpp"} and not _has_tokenizer(base.side_files):
        yield "with a tokenizer from elsewhere"


def _lacking(base: Checkpoint) -> Iterator[str]:
    """Yield what every program needs and the checkpoint lacks."""
    if base.config is None:
        yield "config.json not found"
    elif not base.config.get("architectures"):
        yield "config.json names no architecture"


def _has_tokenizer(files: Collection[str]) -> bool:
    """Return True if a tokenizer's file lies beside the weights; of a model on the Hub, files may not be listed."""
    return not files or any(name in TOKENIZERS for name in files)


def _objection(loader: str, method: str, base: Checkpoint) -> str | None:
    """Return why a program does not load a kind of quantisation; None if it does."""
    if base.gguf:
        return "reads no GGUF; a merge with --dequantize is dense" if loader == "MLX" else None
    own = isinstance((base.config or {}).get("quantization"), Mapping)
    if own or method == "mlx":
        return None if loader == "MLX" else "MLX's quantisation is its own; a merge with --dequantize is dense"
    if loader == "MLX":
        return f"{method} is not decoded; a merge with --dequantize is dense"
    if loader == "llama.cpp" and method in {"bitsandbytes", "awq", "torchao", "modelopt"}:
        return f"its converter reads no {method}; a merge with --dequantize is dense"
    if method not in SERVED and loader in {"vLLM", "SGLang"}:
        return f"{method} is not among the methods that are known to be served"
    return None
