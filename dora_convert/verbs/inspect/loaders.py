"""Hold the rules of programs that load adapters: the formats that each reads, and what each cannot do.

Data only. A rule names a feature of an adapter, and says what the program does with it: it refuses, or it loads
something else. Each has its source: a file of the program, or an issue. Rules were read in 2026.
"""

from __future__ import annotations

from typing import NamedTuple

REFUSES, WRONG = "no", "wrong"
MERGE, LORA, CONVERT = "merge", "to-lora", "convert"
"""Ways to something that the program takes: a merged model, a plain LoRA, another format."""


class LoaderRule(NamedTuple):
    """One thing that a program does not do with adapters."""

    feature: str
    """A key of `FEATURES`."""
    verdict: str
    """REFUSES, or WRONG: it loads other weights than were trained, mostly without a word."""
    why: str
    source: str
    remedy: str = MERGE


class Loader(NamedTuple):
    """One program: the formats that it reads, the models that it runs, and its rules."""

    name: str
    formats: tuple[str, ...]
    source: str
    rules: tuple[LoaderRule, ...]
    language: bool = True
    """True for language models, False for image models."""
    writes: str = ""
    """The format that `convert` writes for it."""


FEATURES = {
    "dora": "magnitudes",
    "kohya dora": "magnitudes in kohya's format",
    "dora by columns": "magnitudes of columns",
    "unsaid dora": "magnitudes that the config does not announce",
    "patterns": "several ranks or alphas",
    "alphas": "several alphas",
    "rslora": "rsLoRA's scaling",
    "scaled": "a scaling other than 1",
    "whole": "modules saved whole",
    "biases": "trained biases",
    "rows": "trained tokens",
    "embeddings": "factors of embeddings or heads",
    "convolutions": "factors of convolutions",
    "experts": "factors of stacked experts",
    "start": "a start of training that moved the base",
    "other kinds": "updates that are not low rank",
}
"""All that rules ask for, and the words for it."""

_VLLM, _SGLANG = "vllm/lora/peft_helper.py", "sglang/srt/lora/lora.py, lora_config.py"
_LLAMA, _COMFY = "llama.cpp/convert_lora_to_gguf.py", "comfy/lora.py, comfy/weight_adapter/base.py"
_DIFFUSERS, _MLX = "diffusers/loaders/lora_pipeline.py", "mlx_lm/tuner/utils.py"

LOADERS = (
    Loader(
        "PEFT",
        ("peft",),
        "peft/tuners/lora",
        (
            LoaderRule(
                "unsaid dora", WRONG, "without use_dora the magnitudes are dropped", "peft/utils/save_and_load.py"
            ),
            LoaderRule("dora by columns", REFUSES, "its magnitudes are of rows", "peft/tuners/lora/dora.py"),
        ),
        writes="peft",
    ),
    Loader(
        "vLLM",
        ("peft",),
        _VLLM,
        (
            LoaderRule("dora", REFUSES, '"vLLM does not yet support DoRA"', f"{_VLLM}; vllm issue 10849", LORA),
            LoaderRule("whole", REFUSES, "modules_to_save must be empty", _VLLM),
            LoaderRule("rows", REFUSES, "trained tokens are not read", _VLLM),
            LoaderRule("other kinds", REFUSES, "only lora_A and lora_B are read", _VLLM, LORA),
            LoaderRule("start", WRONG, "the base of training is not restored", _VLLM, LORA),
            LoaderRule("patterns", WRONG, "one r and one lora_alpha are read for all modules", _VLLM, LORA),
            LoaderRule("convolutions", REFUSES, "only linear layers and embeddings have LoRA", "vllm/lora/layers"),
            LoaderRule("biases", WRONG, "biases are not read", _VLLM),
        ),
        writes="peft",
    ),
    Loader(
        "SGLang",
        ("peft",),
        _SGLANG,
        (
            LoaderRule("dora", REFUSES, "use_dora is recorded, and no code computes with it", _SGLANG, LORA),
            LoaderRule("whole", WRONG, "only lora_A and lora_B are used", _SGLANG),
            LoaderRule("rows", WRONG, "trained tokens are not read", _SGLANG),
            LoaderRule("other kinds", REFUSES, "peft_type must be LORA", _SGLANG, LORA),
            LoaderRule("start", WRONG, "the base of training is not restored", _SGLANG, LORA),
            LoaderRule("rslora", WRONG, "the scaling is lora_alpha / r", _SGLANG, LORA),
            LoaderRule("patterns", WRONG, "one r and one lora_alpha are used for all modules", _SGLANG, LORA),
            LoaderRule("convolutions", REFUSES, "only linear layers have LoRA", _SGLANG),
            LoaderRule("biases", WRONG, "biases are not read", _SGLANG),
        ),
        writes="peft",
    ),
    Loader(
        "llama.cpp",
        ("peft",),
        _LLAMA,
        (
            LoaderRule(
                "dora", REFUSES, '"Unexpected name": not lora_A or lora_B', f"{_LLAMA}; llama.cpp issue 6536", LORA
            ),
            LoaderRule("whole", REFUSES, '"Unexpected name": not lora_A or lora_B', _LLAMA),
            LoaderRule("rows", REFUSES, '"Unexpected name": not lora_A or lora_B', _LLAMA),
            LoaderRule("biases", REFUSES, '"Unexpected name": not lora_A or lora_B', _LLAMA),
            LoaderRule("other kinds", REFUSES, '"Unexpected name": not lora_A or lora_B', _LLAMA, LORA),
            LoaderRule("start", WRONG, "the base of training is not restored", _LLAMA, LORA),
            LoaderRule("rslora", WRONG, "the scaling is lora_alpha / rank", _LLAMA, LORA),
            LoaderRule("alphas", WRONG, "one lora_alpha is written for all modules", _LLAMA, LORA),
        ),
        writes="gguf",
    ),
    Loader(
        "MLX",
        ("mlx",),
        _MLX,
        (
            LoaderRule("patterns", WRONG, "one rank and one scale are used for all layers", _MLX, LORA),
            LoaderRule("embeddings", REFUSES, "its loader makes adapters of linear layers only", _MLX),
            LoaderRule("convolutions", REFUSES, "its loader makes adapters of linear layers only", _MLX),
            LoaderRule("whole", REFUSES, "its files hold no modules saved whole", _MLX),
            LoaderRule("rows", REFUSES, "its files hold no trained tokens", _MLX),
            LoaderRule("biases", REFUSES, "its files hold no biases", _MLX),
            LoaderRule("start", WRONG, "the base of training is not restored", _MLX, LORA),
            LoaderRule("other kinds", REFUSES, "its files hold lora_a, lora_b and m", _MLX, LORA),
        ),
        writes="mlx",
    ),
    Loader(
        "diffusers",
        ("diffusers", "kohya"),
        _DIFFUSERS,
        (
            LoaderRule("kohya dora", WRONG, "dora_scale is dropped with a warning", _DIFFUSERS, CONVERT),
            LoaderRule("other kinds", REFUSES, "only factors are read", _DIFFUSERS),
        ),
        language=False,
        writes="diffusers",
    ),
    Loader(
        "ComfyUI",
        ("kohya", "diffusers"),
        _COMFY,
        (
            LoaderRule(
                "kohya dora", WRONG, "rows are divided by ‖W‖, not by ‖W + sBA‖", f"{_COMFY}; pull request 15458"
            ),
            LoaderRule("dora", WRONG, "lora_magnitude_vector is not read", _COMFY, CONVERT),
        ),
        language=False,
        writes="kohya",
    ),
)
"""The programs, in the order of the report."""
