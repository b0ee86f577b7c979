"""Change what a config says of quantisation: take it out, or name modules that are dense now.

There are four places: `quantization_config`, `compression_config`, MLX's `quantization`, and a side file of
modelopt. torchao also describes each tensor in the metadata of its file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..codecs.evidence import PLACES
from ..errors import UsageError
from ..naming.resolve import is_embedding
from ..options import flag
from ..settings import require_extra
from ..storage.checkpoint import Checkpoint

Config = Mapping[str, Any]
SKIP_LISTS = {
    "fp8": ("modules_to_not_convert",),
    "mxfp4": ("modules_to_not_convert",),
    "awq": ("modules_to_not_convert",),
    "torchao": ("modules_to_not_convert",),
    "bitsandbytes": ("llm_int8_skip_modules",),
    "compressed-tensors": ("ignore",),
    "modelopt": ("ignore", "exclude_modules"),
}
"""The fields that list dense modules, by method; the first is added if none exists."""
TORCHAO_NAMES = "tensor_names"


CHOICES = {"dequantize": "all", "dequantize_touched": "touched", "requantize": "again"}
"""The options that say what becomes of quantised weights."""


def parse_choice(given: Mapping[str, Any]) -> str:
    """Return what becomes of quantised weights; UsageError for options that contradict each other."""
    chosen = [option for option in (*CHOICES, "base_as") if given.get(option)]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(map(flag, chosen))} contradict each other.", hint="give one of them")
    if chosen == ["base_as"]:
        require_extra("nf4", "--base-as")
        return f"as {given['base_as']}"
    return CHOICES[chosen[0]] if chosen else ""


def undo_of_gguf(asked: str | None) -> str:
    """Return the undo record of a GGUF base: none; UsageError if the caller asks for one."""
    if asked not in (None, "none"):
        raise UsageError(
            f"--undo {asked}: a GGUF file cannot be given back by unmerge.", hint="keep the file; leave --undo out"
        )
    return "none"


def without_quantisation(config: Config) -> dict[str, Any]:
    """Return a config that says nothing of quantisation, nested configs included."""
    return {
        key: without_quantisation(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in PLACES
    }


def skipping(config: Config, modules: Sequence[str], others: Iterable[str]) -> dict[str, Any]:
    """Return a config, or modelopt's side file, that lists some modules as dense.

    `others` are the modules that were dense before. A list that is null says so by rule; a list that is not null
    replaces the rule, so they are listed, too.
    """
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in PLACES and isinstance(value, Mapping):
            changed[key] = _skipping(value, modules, others)
        else:
            changed[key] = skipping(value, modules, others) if isinstance(value, Mapping) else value
    return changed


def _skipping(said: Config, modules: Sequence[str], others: Iterable[str]) -> dict[str, Any]:
    """Return one description of quantisation with more dense modules."""
    method = said.get("quant_method")
    if method in ("gptq", "auto-round"):
        rules: Config = {f"-:^{re.escape(module)}$": {} for module in modules}
        return {**said, "dynamic": {**(said.get("dynamic") or {}), **rules}}
    if "group_size" in said and method is None and "config_groups" not in said and "quant_algo" not in said:
        return {**said, **dict.fromkeys(modules, False)}  # MLX
    fields = SKIP_LISTS.get(str(method)) or ("exclude_modules" if "quant_algo" in said else "ignore",)
    present = [field for field in fields if field in said] or fields[:1]
    return {**said, **{field: _more(said.get(field), modules, others) for field in present}}


def _more(listed: Any, modules: Sequence[str], others: Iterable[str]) -> list[str]:
    before = list(listed) if isinstance(listed, list) else list(others)
    return [*before, *(module for module in modules if module not in before)]


def dense_modules(base: Checkpoint, coded: Collection[str]) -> list[str]:
    """Return the modules of a quantised base whose weights are dense, and the head."""
    names = [
        name
        for name, tensor in base.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and name not in coded and not is_embedding(name)
    ]
    return sorted({"lm_head", *(name.removesuffix(".weight") for name in names)})


def undescribed(metadata: Mapping[str, str], dense: Collection[str] | None) -> Mapping[str, str]:
    """Return a file's metadata without torchao's description of dense weights; None stands for all weights."""
    if TORCHAO_NAMES not in metadata:
        return metadata
    names: list[Any] = []
    with suppress(ValueError, RecursionError):
        value = json.loads(metadata[TORCHAO_NAMES])
        names = value if isinstance(value, list) else []
    if dense is None:
        return {key: text for key, text in metadata.items() if key != TORCHAO_NAMES and key not in names}
    return {key: json.dumps({"_type": "Tensor"}) if key in dense else text for key, text in metadata.items()}
