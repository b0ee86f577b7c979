"""Ways to break a file a little, drawn from a random number generator: bytes, JSON values, safetensors headers and bodies."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Change = Callable[[random.Random, bytes], bytes]

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 3, 1.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**30, 10**400,
    "", "x", "a\0b", "\n", "\ud800", "../x", "/x", "9" * 5000, "x" * 5000, "(", "lm_head", "none", "F32", "LORA", "pissa",
    [], [[]], [0], [-1], [0, 10**12], [[0, 2]], [[0, 10**12]], [[1, 0]], ["x"], [None], [{}], [10**18] * 50, ["0", "1"],
    {}, {"": 1}, {"x": None}, {"x": "y"}, {"up_proj": 3}, {"quant_method": 5}, {"x": {"y": []}}, {"nblocks": 2},
]  # fmt: skip
"""Values that a field may have instead of its own."""

KEYS = (
    "", "x", "bias", "lora_bias", "use_dora", "rank_pattern", "alpha_pattern", "layer_replication", "target_parameters",
    "trainable_token_indices", "modules_to_save", "init_lora_weights", "use_bdlora", "kasa_config", "peft_version",
    "ensure_weight_tying", "auto_mapping", "task_type", "revision", "text_config", "num_hidden_layers", "vocab_size",
    "quantization_config", "tie_word_embeddings", "architectures", "layer_types", "__metadata__", "weight_map", "init_r",
    "../x", "starts", "file", "config", "of", "base", "written", "fate", "rounded", "assumed", "staged", "removed", "made",
)  # fmt: skip
"""Fields that may come to be there."""


def change_bytes(chance: random.Random, data: bytes) -> bytes:
    """A few bytes changed, inserted, left out or said twice; more often near the start, where headers are."""
    raw = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        reach = len(raw) if chance.random() < 0.5 else min(len(raw), 300)
        at = chance.randrange(reach + 1)
        piece = raw[at : at + chance.choice((1, 2, 8, 64))]
        match chance.randrange(6):
            case 0 | 1 if at < len(raw):
                raw[at] = chance.choice((0, 0xFF, raw[at] ^ 1 << chance.randrange(8), chance.randrange(256)))
            case 2:
                raw[at:at] = chance.randbytes(chance.choice((1, 8)))
            case 3:
                del raw[at : at + len(piece)]
            case 4:
                raw[at:at] = piece
            case 5:
                del raw[at if chance.random() < 0.2 else len(raw) :]
    return bytes(raw)


def change_value(chance: random.Random, value: Any) -> Any:
    """A JSON value where something deep inside is another."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        return _change_entry(chance, value)
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        new = chance.choice(([], [value[at]] * 2, [change_value(chance, value[at])]))
        return [*value[:at], *new, *value[at + 1 :]]
    if type(value) is int and chance.random() < 0.5:
        return value + chance.choice((-1, 1, 4, -4, 2**32))
    return chance.choice(NASTY)


def _change_entry(chance: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    key = chance.choice(list(value))
    kept = {name: item for name, item in value.items() if name != key}
    match chance.randrange(8):
        case 0:
            return kept
        case 1:
            return {**kept, chance.choice([*KEYS, key + "x", key.replace("0", "1")]): value[key]}
        case 2:
            return {**value, chance.choice(KEYS): chance.choice(NASTY)}
    return {**value, key: change_value(chance, value[key])}


def change_json(chance: random.Random, data: bytes) -> bytes:
    """A JSON file with another value, or other bytes."""
    if chance.random() < 0.3:
        return change_bytes(chance, data)
    value = json.loads(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        value = change_value(chance, value)
    return json.dumps(value).encode(errors="surrogatepass")


def change_header(chance: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header, with or without its length put right."""
    if chance.random() < 0.4:
        return change_bytes(chance, data)
    end = 8 + int.from_bytes(data[:8], "little")
    text = change_json(chance, data[8:end])
    length = len(text) if chance.random() < 0.9 else end - 8
    return length.to_bytes(8, "little") + text + data[end:]


def change_body(chance: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header still fits, with some bytes after it changed, more often where they are few."""
    start = 8 + int.from_bytes(data[:8], "little")
    raw = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        raw[chance.randrange(start, len(raw))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    return bytes(raw)


def change_packed(chance: random.Random, data: bytes) -> bytes:
    """A packed block with other numbers before its frames, or in them."""
    if chance.random() < 0.5:
        return change_bytes(chance, data)
    raw = bytearray(data)
    at = 4 * chance.randrange(5)
    raw[at : at + 4] = chance.choice((0, 1, 255, 2**16, 2**31, 2**32 - 1, chance.randrange(2**32))).to_bytes(
        4, "little"
    )
    return bytes(raw)


def change_lines(chance: random.Random, data: bytes) -> bytes:
    """A journal with another value in one of its lines, with lines that are gone, double or torn, or with other bytes."""
    if chance.random() < 0.2:
        return change_bytes(chance, data)
    lines = data.splitlines(keepends=True)
    at = chance.randrange(len(lines))
    match chance.randrange(8):
        case 0:
            del lines[at]
        case 1:
            lines[at:at] = [chance.choice(lines)]
        case _:
            lines[at] = change_json(chance, lines[at].rstrip()) + b"\n"
    return b"".join(lines)
