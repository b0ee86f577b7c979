"""Find the weights that a PEFT config says were trained, by PEFT's own rules (check_target_module_exists)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from .config import Config

_EMBEDDING = "embed_tokens"
"""The module that a list in trainable_token_indices is for."""
_FIRST_LAYER = r"[^.]*"
"""The layers_pattern of a config without one: any name before the first number counts."""


def promised(
    config: Config, pruned: Collection[str], shapes: Mapping[str, Sequence[int]], is_linear: Callable[[str], bool]
) -> list[str]:
    """Return the weights that were trained, of a model's tensors by name; some are weights of linear layers.

    Modules that AdaLoRA has `pruned` hold nothing. `target_parameters` promise nothing, and neither do parts of
    MultiheadAttention. Raises MalformedError for a pattern that takes too long.
    """
    weights = {name.removesuffix(".weight"): name for name, shape in shapes.items() if len(shape) > 1}
    names = [weights[module] for module in _targets(config, weights, is_linear) if module not in pruned]
    names += [name for name in shapes if config.modules_to_save and config.saves(name)]
    return [*names, *(weights[module] for module in _embeddings(config, weights))]


def _targets(config: Config, weights: Mapping[str, str], is_linear: Callable[[str], bool]) -> Iterator[str]:
    """Yield the modules that target_modules and its exceptions leave."""
    target = config.target_modules
    if isinstance(target, str) and target.lower() == "all-linear":
        chosen: Callable[[str], object] = lambda module: is_linear(weights[module])  # noqa: E731
    else:
        chosen = _chooser(target, weights, "target_modules")
    excluded = _chooser(config.exclude_modules, weights, "exclude_modules")
    in_layers = (lambda _: True) if isinstance(target, str) else _layers(config, weights)
    saved = tuple(f".{name}." for name in config.modules_to_save)
    for module in weights:
        within = any(name in f".{module}." for name in saved)
        if not within and chosen(module) and not excluded(module) and in_layers(module):
            yield module


def _chooser(value: object, names: Collection[str], field: str) -> Callable[[str], object]:
    """Return a test of a module's name: by one regular expression, or by a list of names and ends of names."""
    if isinstance(value, str):
        return _matcher([(field, value, rf"(?:{value})\Z")], names)
    listed = [name for name in value if isinstance(name, str)] if isinstance(value, list | tuple) else []
    ends = tuple(f".{name}" for name in listed)
    return lambda module: f".{module}".endswith(ends)


def _layers(config: Config, names: Collection[str]) -> Callable[[str], bool]:
    """Return a test of a module's name: True in the layers of layers_to_transform, or anywhere without them."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return lambda _: True
    numbers = wanted if isinstance(wanted, list) else [wanted]
    given = config.layers_pattern
    listed = given if isinstance(given, list) else [given]
    patterns = [name for name in listed if isinstance(name, str) and name] or [_FIRST_LAYER]
    start = r".*?\." if patterns == [_FIRST_LAYER] else r"(?:^|.*?\.)"
    number = _matcher([("layers_pattern", each, rf"{start}{each}\.(?P<number>\d+)\.") for each in patterns], names)

    def test(module: str) -> bool:
        found = number(module)
        return found is not None and int(found["number"]) in numbers

    return test


def _matcher(patterns: Sequence[tuple[str, str, str]], names: Collection[str]) -> Callable[[str], re.Match[str] | None]:
    """Return a function that finds the first match; an invalid expression matches nothing."""
    from .patterns import refuse_slow

    try:
        compiled = [re.compile(expression) for _, _, expression in patterns]
    except re.error:
        return lambda _: None
    refuse_slow(patterns, names)
    return lambda name: next((found for regex in compiled if (found := regex.match(name))), None)


def _embeddings(config: Config, modules: Collection[str]) -> Iterator[str]:
    """Yield the embeddings of which trainable_token_indices has rows."""
    indices = config.token_indices
    names = tuple(indices) if isinstance(indices, dict) else (_EMBEDDING,) if indices else ()
    ends = tuple(f".{name}" for name in names)
    yield from (module for module in modules if f".{module}".endswith(ends))
