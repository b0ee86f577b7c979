"""Change config.json if a merge changes a fact that a loader must know; nested configs included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import MalformedError
from ..naming.families import BEFORE_LABELS, LABEL_LAYERS, SUFFIXES
from ..storage.safetensors import CONFIG_DTYPES
from .plan import Options

Config = Mapping[str, Any]


def _rewrite(config: Config, key: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a config with every value of a key changed, in nested configs too."""

    def rewritten(name: str, value: Any) -> Any:
        if name == key:
            return change(value)
        return _rewrite(value, key, change) if isinstance(value, Mapping) else value

    return {name: rewritten(name, value) for name, value in config.items()}


def for_output(
    config: Config,
    options: Options,
    task: str | None,
    *,
    untie: bool,
    resized: Mapping[str, tuple[int, int]],
    added: Mapping[str, tuple[int, ...]],
    headless: bool,
) -> Config:
    """Return a config for an output: its dtype, its ties, its vocabulary and its head.

    `resized` holds old and new rows of embeddings and heads, `added` the shapes of tensors that the base lacks.
    `headless` says that a bare model gets its embedding as a head, `task` which class it becomes.
    """
    if options.dtype:
        config = with_dtype(config, options.dtype)
    if untie:
        config = untied(config)
    for old, new in list(resized.values())[:1]:
        config = with_vocabulary(config, old, new)
    if added or headless:
        config = with_head(config, task, added)
    return with_legacy_rope(config) if options.legacy_config else config


def with_dtype(config: Config, dtype: str) -> Config:
    """Return a config whose dtype keys name this dtype, given as safetensors calls the dtype."""
    name = CONFIG_DTYPES[dtype]
    for key in ("dtype", "torch_dtype"):
        config = _rewrite(config, key, lambda value: name if isinstance(value, str) else value)
    return config if {"dtype", "torch_dtype"} & config.keys() else {**config, "dtype": name}


def untied(config: Config) -> Config:
    """Return a config that says that embedding and head are two weights."""
    return {**_rewrite(config, "tie_word_embeddings", lambda _: False), "tie_word_embeddings": False}


def with_legacy_rope(config: Config) -> dict[str, Any]:
    """Return a config whose rope_parameters also stand in the fields that transformers 4 has for them.

    Raises MalformedError if such a field exists and differs.
    """
    changed = {name: with_legacy_rope(value) if isinstance(value, Mapping) else value for name, value in config.items()}
    for name, value in _legacy_rope(config.get("rope_parameters")).items():
        if changed.get(name) is None:
            changed[name] = value
        elif changed[name] != value:
            raise MalformedError(f"config.json: {name} is {changed[name]!r}, but rope_parameters says {value!r}.")
    return changed


def _legacy_rope(parameters: Any) -> dict[str, Any]:
    """Return the older fields of rope_parameters; parameters by kind of layer are those of Gemma 3."""
    if not isinstance(parameters, Mapping):
        return {}
    if "full_attention" in parameters:
        local = _legacy_rope(parameters.get("sliding_attention")).get("rope_theta")
        return _legacy_rope(parameters["full_attention"]) | ({"rope_local_base_freq": local} if local else {})
    fields = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
    if parameters.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {name: value for name, value in parameters.items() if name not in fields}
    return fields


def with_vocabulary(config: Config, old: int, new: int) -> Config:
    """Return a config for an embedding with another number of rows."""
    changed = _rewrite(config, "vocab_size", lambda value: new if value == old else value)
    if changed != config:
        return changed
    if "vocab_size" in config:
        return {**config, "vocab_size": new}
    return _rewrite(config, "vocab_size", lambda _: new)


def with_head(config: Config, task: str | None, shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """Return a config for a head that the base lacks: its class, and the number of labels.

    `task` is a class of transformers or the end of its name; `shapes` are the added tensors' by name.
    """
    changed: dict[str, Any] = dict(config)
    if task and task != "ForCausalLM":  # whose class has other names in some families
        changed["architectures"] = [_class_of(config, task)]
    weights = [
        shape
        for name, shape in shapes.items()
        if name.partition(".")[2] in LABEL_LAYERS and len(shape) == 2 and not name.startswith(BEFORE_LABELS)
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
    """Return the family's class for a task, from the class name that the config has."""
    architectures = config.get("architectures")
    if not task.startswith("For") or not (isinstance(architectures, list) and architectures):
        return task
    name = str(architectures[0])
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix) + task
