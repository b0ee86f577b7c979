"""Make a tokenizer's files, as transformers reads them, from the pairs of a GGUF model.

tokenizer.json is the file of the tokenizers library: a vocabulary, merges, and the steps before and after them. A GGUF
file has the first two. It names the steps by a word (`tokenizer.ggml.pre`), whose meaning is in llama.cpp's code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .gguf_model import GgufModel

CONTROL, USER_DEFINED = 3, 4
UNLIMITED = int(1e30)
_WORDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{0}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{0}"
)
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PLAIN = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|{0}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _WORDS
LLAMA3, QWEN2 = _PLAIN.replace("{0}", r"\p{N}{1,3}"), _PLAIN.replace("{0}", r"\p{N}")
TEKKEN = _CASED.replace("{0}", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _WORDS
GPT4O = _CASED.replace("{0}", f"{_SHORT}?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _WORDS
SPLITS = {
    "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "falcon3": LLAMA3, "smaug-bpe": LLAMA3, "dbrx": LLAMA3,
    "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2, "megrez": QWEN2, "tekken": TEKKEN, "gpt-4o": GPT4O,
}  # fmt: skip
"""The patterns that cut text into words, by llama.cpp's name."""
DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r"})
"""Names of GPT-2's pattern with every digit alone."""
PLAIN = frozenset({"default", "gpt-2", "gpt2", "phi-2", "olmo", ""})
"""Names of GPT-2's pattern itself."""
WITH_START = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})
"""Names whose tokenizers begin every text with the first token, and take whole words without merges."""


def make_tokenizer(model: GgufModel) -> dict[str, bytes]:
    """Return the files by name; none if the kind of the tokenizer is not known."""
    pairs = {key.removeprefix("tokenizer.ggml."): value for key, value in model.pairs.items()}
    kind, pre, tokens = pairs.get("model"), str(pairs.get("pre", "")), pairs.get("tokens")
    if not isinstance(tokens, list):
        return {}
    if kind == "gpt2" and (pre in SPLITS or pre in DIGITS or pre in PLAIN) and pairs.get("merges"):
        steps = _byte_level(pairs, pre)
    elif kind == "llama" and (pairs.get("scores") or pairs.get("merges")):
        steps = _sentencepiece(pairs, gemma=model.architecture.startswith("gemma"))
    else:
        return {}
    start = pairs.get("add_bos_token", kind == "llama" or pre in WITH_START)
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*_added(pairs, byte=kind == "gpt2")],
    }
    whole |= steps | {"post_processor": _around(pairs, start=bool(start), end=bool(pairs.get("add_eos_token")))}
    files = {"tokenizer.json": _json(whole), "tokenizer_config.json": _json(_config(pairs))}
    if isinstance(template := model.pairs.get("tokenizer.chat_template"), str):
        files["chat_template.jinja"] = template.encode()
    return files


def _byte_level(pairs: Mapping[str, Any], pre: str) -> dict[str, Any]:
    """Return the steps of GPT-2's kind, whose tokens are spelled in one letter for each byte."""
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre not in SPLITS}
    first = {"type": "Digits", "individual_digits": True} if pre in DIGITS else None
    if pre in SPLITS:
        first = {"type": "Split", "pattern": {"Regex": SPLITS[pre]}, "behavior": "Isolated", "invert": False}
    merges = [merge.split(" ") for merge in pairs["merges"]]
    return {
        "normalizer": {"type": "NFC"} if SPLITS.get(pre) == QWEN2 else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [first, last]} if first else last,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(_vocabulary(pairs["tokens"]), merges, ignore_merges=pre in WITH_START),
    }


def _sentencepiece(pairs: Mapping[str, Any], *, gemma: bool) -> dict[str, Any]:
    """Return the steps of SentencePiece's kind, whose tokens have ▁ for a space; Gemma puts none before a text."""
    tokens = list(pairs["tokens"])
    if gemma:
        tokens = ["▁" * len(token) if " " in token and not token.strip() else token for token in tokens]
    scores = range(0, -len(tokens), -1) if gemma else pairs.get("scores", ())
    merges = [merge.split(" ") for merge in pairs.get("merges", ())] or _merges(tokens, scores)
    prefix = not gemma and pairs.get("add_space_prefix", True)
    spaces: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    first = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    unknown = _token(pairs, "unknown")
    return {
        "normalizer": first if prefix else spaces,
        "pre_tokenizer": cut if gemma else None,
        "decoder": {"type": "Sequence", "decoders": back + strip},
        "model": _bpe(_vocabulary(tokens), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def _bpe(vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]], **given: Any) -> dict[str, Any]:
    usual = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **usual, **flags, **given, "vocab": vocabulary, "merges": merges}


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(tokens):
        vocabulary.setdefault(token, number)
    return vocabulary


def _merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return every pair of tokens that makes a token, the best token's pairs first."""
    number = _vocabulary(tokens)
    found = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in number and right in number:
                found.append((-score, -cut, cut - len(token), number[left], number[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _added(pairs: Mapping[str, Any], *, byte: bool) -> Iterator[dict[str, Any]]:
    """Yield the tokens that stay whole in a text; words of control that are no bytes' letters are mistakes."""
    places = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for number, (token, kind) in enumerate(zip(pairs["tokens"], pairs.get("token_type", ()), strict=False)):
        spelled = not byte or all("!" <= letter <= "~" or "¡" <= letter <= "ń" for letter in token)
        if kind == USER_DEFINED or (kind == CONTROL and spelled):
            yield {"id": number, "content": token, **places, "special": kind == CONTROL}


def _token(pairs: Mapping[str, Any], name: str) -> str | None:
    """Return the token that a pair names by its number."""
    number, tokens = pairs.get(f"{name}_token_id"), pairs["tokens"]
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _around(pairs: Mapping[str, Any], *, start: bool, end: bool) -> dict[str, Any] | None:
    """Return the step that puts the first and the last token around a text."""
    first = _token(pairs, "bos") if start else None
    last = _token(pairs, "eos") if end else None
    if not first and not last:
        return None

    def framed(name: str, number: int) -> list[dict[str, Any]]:
        inner = {"Sequence": {"id": name, "type_id": number}}
        put = [{"SpecialToken": {"id": token, "type_id": number}} if token else None for token in (first, last)]
        return [step for step in (put[0], inner, put[1]) if step]

    special = {
        token: {"id": token, "ids": [pairs["tokens"].index(token)], "tokens": [token]}
        for token in (first, last)
        if token
    }
    pair = framed("A", 0) + framed("B", 1)
    return {"type": "TemplateProcessing", "single": framed("A", 0), "pair": pair, "special_tokens": special}


def _config(pairs: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    tokens = {f"{short}_token": token for name, short in names.items() if (token := _token(pairs, name))}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": UNLIMITED,
        **tokens,
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
