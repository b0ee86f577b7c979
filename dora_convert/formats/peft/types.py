"""Of what types the fields of PEFT's `adapter_config.json` are, and what stands for those that are absent."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import MalformedError, shown

MOST_LAYERS = 10_000


def checked(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Every field that counts, PEFT's default where it is absent; MalformedError for a wrong type."""
    found = {}
    for field, (default, check, wants) in TYPES.items():
        value = raw.get(field)
        if field == "rank_pattern" and str(raw.get("peft_type")).upper() == "ADALORA":
            value = None  # there it holds masks
        found[field] = default if value is None else value
        if not check(found[field]):
            raise MalformedError(f"{path}: {field} must be {wants}, not {shown(value)}.")
    return found


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(type(row) is int and row >= 0 for row in value)


def _is_tokens(value: Any) -> bool:
    return _is_rows(value) or (isinstance(value, dict) and all(map(_is_rows, value.values())))


def _is_ranges(value: Any) -> bool:
    ranges = isinstance(value, list) and all(_is_rows(pair) and len(pair) == 2 for pair in value)
    return ranges and sum(last - first for first, last in value) <= MOST_LAYERS


def _is_block_diagonal(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_rank(value.get("nblocks", 1)):
        return False
    return all(_is_names(value.get(f"target_modules_bd_{side}") or []) for side in "ab")


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and re.match(r"\d{1,4}(\.\d{1,4})*(?!\d)", value) is not None


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_pattern(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(check(item) and _is_regex(key) for key, item in value.items())


def _is_regex(key: str) -> bool:
    try:
        re.compile(key)
    except re.error:
        return False
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_ranks(value: Any) -> bool:
    return _is_pattern(value, _is_rank)


def _is_alphas(value: Any) -> bool:
    return _is_pattern(value, _is_alpha)


def _is_bias(value: Any) -> bool:
    return value in ("none", "all", "lora_only")


TYPES: Mapping[str, tuple[Any, Callable[[Any], bool], str]] = {
    "peft_type": ("LORA", _is_text, "a string"),
    "r": (8, _is_rank, "a positive integer"),
    "init_r": (12, _is_rank, "a positive integer"),
    "lora_alpha": (8, _is_alpha, "a positive number: otherwise a merge changes nothing"),
    "use_rslora": (False, _is_bool, "true or false"),
    "use_dora": (False, _is_bool, "true or false"),
    "ensure_weight_tying": (False, _is_bool, "true or false"),
    "rank_pattern": ({}, _is_ranks, "regexes to positive integers"),
    "alpha_pattern": ({}, _is_alphas, "regexes to positive numbers"),
    "modules_to_save": ([], _is_names, "a list of module names"),
    "target_parameters": ([], _is_names, "a list of parameter names"),
    "bias": ("none", _is_bias, "none, all or lora_only"),
    "base_model_name_or_path": ("", _is_text, "a string"),
    "revision": ("", _is_text, "a string"),
    "layer_replication": ([], _is_ranges, f"a list of [start, end], at most {MOST_LAYERS} layers"),
    "trainable_token_indices": ({}, _is_tokens, "token numbers, or names to those"),
    "use_bdlora": ({}, _is_block_diagonal, "an object with nblocks and patterns"),
    "peft_version": ("0", _is_version, "a version"),
}
