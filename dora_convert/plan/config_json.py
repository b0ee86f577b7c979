"""config.json, changed only where a merge changes what a loader must know; nested configs included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..storage.safetensors import CONFIG_DTYPES

Config = Mapping[str, Any]
SUFFIXES = (
    "LMHeadModel", "DoubleHeadsModel", "ForCausalLM", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration",
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model",
)  # fmt: skip
"""How the names of transformers' model classes end, after the name of the family."""
OUTPUT_LAYERS = ("weight", "out_proj.weight")
BEFORE = "pre_classifier."
"""DistilBERT's layer before the one whose rows are labels."""


def _rewrite(config: Config, key: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    """A config where the value of a key is changed wherever the key is."""
    return {
        name: change(value)
        if name == key
        else _rewrite(value, key, change)
        if isinstance(value, Mapping)
        else value
        for name, value in config.items()
    }


def with_dtype(config: Config, dtype: str) -> Config:
    """Every dtype key that names one dtype names this one, given as safetensors calls it."""
    name = CONFIG_DTYPES[dtype]
    for key in ("dtype", "torch_dtype"):
        config = _rewrite(config, key, lambda value: name if isinstance(value, str) else value)
    return config if {"dtype", "torch_dtype"} & config.keys() else {**config, "dtype": name}


def untied(config: Config) -> Config:
    """Embedding and head are two weights."""
    return {**_rewrite(config, "tie_word_embeddings", lambda _: False), "tie_word_embeddings": False}


def with_vocabulary(config: Config, old: int, new: int) -> Config:
    """The embedding has another number of rows."""
    changed = _rewrite(config, "vocab_size", lambda value: new if value == old else value)
    if changed != config:
        return changed
    return (
        {**config, "vocab_size": new}
        if "vocab_size" in config
        else _rewrite(config, "vocab_size", lambda _: new)
    )


def with_head(config: Config, task: str | None, shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """A head that the base lacks: the class that has it, and how many labels it tells apart.

    `task` is a class of transformers or how its name ends; `shapes` holds what was added.
    """
    changed: dict[str, Any] = dict(config)
    if task and task != "ForCausalLM":  # whose class has other names in some families
        changed["architectures"] = [_class_of(config, task)]
    weights = [
        shape
        for name, shape in shapes.items()
        if name.partition(".")[2] in OUTPUT_LAYERS and len(shape) == 2 and not name.startswith(BEFORE)
    ]
    if weights:
        labels = {number: f"LABEL_{number}" for number in range(weights[-1][0])}
        known = config.get("id2label")
        if not isinstance(known, Mapping) or len(known) != len(labels):
            changed["id2label"] = {str(number): label for number, label in labels.items()}
            changed["label2id"] = {label: number for number, label in labels.items()}
            changed.pop("num_labels", None)
    return changed


def _class_of(config: Config, task: str) -> str:
    """The family's class for a task, from the name of the class that the config has."""
    architectures = config.get("architectures")
    if not task.startswith("For") or not (isinstance(architectures, list) and architectures):
        return task
    name = str(architectures[0])
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix) + task
