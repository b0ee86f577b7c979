"""JSON files that say what weights are: any object, and config.json with the fields that a merge looks at."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MalformedError, shown
from .safetensors import open_file

CONFIG_TYPES = {
    "architectures": list, "model_type": str, "vocab_size": int, "tie_word_embeddings": bool, "torch_dtype": str,
    "text_config": dict, "quantization_config": dict, "num_hidden_layers": int,
}  # fmt: skip
CALLED = {list: "a list", str: "a string", int: "a whole number", bool: "true or false", dict: "an object"}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; MalformedError when it is anything else."""
    try:
        with open_file(path) as file:
            text = file.read().decode("utf-8-sig")
        value = json.loads(text)
        if "\\u" in text:  # half a surrogate pair is no character, and cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        near = shown(error.object[max(0, error.start - 20) : error.end + 40])
        raise MalformedError(f"{path} has half of a character where it says {near}.") from error
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise MalformedError(f"{path} must hold a JSON object.")
    return value


def read_config(root: Path) -> dict[str, Any] | None:
    """config.json, or None where a base has none."""
    path = root / "config.json"
    if not os.path.lexists(path):
        return None
    config = read_json(path)
    _check_types(config, path)
    return config


def _check_types(config: Mapping[str, Any], path: Path) -> None:
    """MalformedError where a field that a merge looks at is of a wrong type, in nested configs, too."""
    for key, value in config.items():
        wanted = CONFIG_TYPES.get(key)
        if wanted and value is not None and type(value) is not wanted:
            raise MalformedError(f"{path}: {key} must be {CALLED[wanted]}, not {shown(value)}.")
        if key == "architectures" and value and not all(isinstance(name, str) for name in value):
            raise MalformedError(f"{path}: architectures must be a list of names, not {shown(value)}.")
        if isinstance(value, dict):
            _check_types(value, path)
