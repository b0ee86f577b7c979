"""Turn PEFT's tensors of one module into updates: their weight, their rank and their scaling."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ...adapters import WRAPPERS, Change, Decomposed, Delta, LowRank, Start, Update, unwrapped
from ...errors import Fault
from .config import Config
from .forms import PREFIX, Forms, Numbers, Parts

if TYPE_CHECKING:
    from .parameters import ParameterTargets

CONFIG = "adapter_config.json"
WEIGHTS: tuple[str, ...] = ("adapter_model.safetensors", "adapter_model.bin")
TWICE_UNTIL = (0, 21, 2)
"""PEFT up to this version added MultiheadAttention's out_proj twice, in training too."""


class _Weight(NamedTuple):
    """The weight that a module's tensors are for; `among` lists several if only shapes can tell."""

    key: str  # matched by rank_pattern and alpha_pattern
    target: str
    times: int = 1  # training added the tensors this often
    among: tuple[str, ...] = ()
    depth: int | None = None


def updates_of(
    modules: Mapping[str, Parts], saved: Collection[str], config: Config
) -> Iterator[Change | Fault | dict[str, str]]:
    """Yield every module's changes, faults, or ignored tensors with the reason.

    The adapter brings the `saved` weights whole, as they were when training began.
    """
    parameters, forms = _targets_of(modules, config), Forms(config)
    for module, parts in modules.items():
        weight = _weight(module, modules, config, parameters)
        if isinstance(weight, Fault):
            yield weight
        elif config.adalora and all(0 in part.shape for part in parts.values()):
            yield {part.name: "AdaLoRA pruned it to rank 0" for part in parts.values()}
        elif isinstance(numbers := forms.find(weight.key, parts), str):
            yield Fault(module, numbers)
        else:
            start = None if weight.target in saved else config.start
            rule = numbers.rule + (", twice" if weight.times == 2 else "")
            update = _update(weight, parts, config, numbers, start)
            change = Change(weight.target, update, weight.among, rule, weight.depth)
            yield change
            if bias := parts.get("b"):
                yield Change(f"{change.module}.bias", Delta(bias, numbers.scaling), rule=rule)


def _targets_of(modules: Collection[str], config: Config) -> ParameterTargets | None:
    """Return what tells parameters from modules, if an adapter has some of them."""
    if not config.parameters:
        return None
    from .parameters import ParameterTargets, outer_of

    names = set(map(outer_of, modules))
    target, everything = config.target_modules, targets_everything(config)
    is_targeted = (lambda _: True) if everything else _chooser(target, names, "target_modules")
    return ParameterTargets(config, modules, is_targeted)


def _weight(
    module: str, modules: Mapping[str, Parts], config: Config, parameters: ParameterTargets | None
) -> _Weight | Fault:
    """Return the weight that a module's tensors are for."""
    attention, inside, leaf = module.rpartition(".base_layer.")
    if (
        inside and leaf != "base_layer" and attention in modules
    ):  # MultiheadAttention wraps its out_proj, whose rank and alpha are its own
        key = _key(attention, modules, config)
        return _Weight(key, f"{attention}.{leaf}.weight", 2 if config.version <= TWICE_UNTIL else 1)
    A = modules[module].get("A")
    meant = parameters.find(module, A.shape[0]) if parameters and A and A.shape else None
    if not meant:
        return _Weight(_key(module, modules, config), f"{module}.weight")
    if isinstance(meant, str):
        return Fault(module, meant)
    return _Weight(_key(meant.target, modules, config), meant.target, among=meant.among, depth=meant.depth)


def _key(module: str, modules: Collection[str], config: Config) -> str:
    """Return the name that patterns match: the live module's, unless a training program put a name into it."""
    bare = unwrapped(module)
    return module if bare in modules or config.has_pattern(module) else bare


def _update(weight: _Weight, parts: Parts, config: Config, numbers: Numbers, start: Start | None) -> Update:
    A, rank = parts["A"], numbers.rank
    embedding = ".lora_embedding_A" in A.name and part_of(plain(A.name))[1] == ".lora_embedding_A"
    linear = len(A.shape) == 2 and not embedding
    update = LowRank(
        A,
        parts["B"],
        weight.times * numbers.scaling,
        None if linear else embedding,
        parts.get("d"),
        blocks=numbers.blocks,
        experts=A.shape[0] // rank if config.parameters and A.shape[0] != rank else 0,
        square=config.square_experts,
        start=start if linear else None,  # embeddings and convolutions begin as usual
        rslora=config.use_rslora,
    )
    return Decomposed(update, parts["m"]) if "m" in parts else update


PARTS: Mapping[str, str] = {
    ".lora_A.weight": "A", ".lora_A": "A", ".lora_B.weight": "B", ".lora_B": "B", ".lora_embedding_A": "A",
    ".lora_embedding_B": "B", ".lora_magnitude_vector": "m", ".lora_magnitude_vector.weight": "m",
    ".lora_E": "d", ".lora_diag": "d", ".lora_B.bias": "b",
}  # fmt: skip
"""A part of a module's update, by the end of a tensor's name."""
TOKENS = (".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")
TOKENS_BASE = ".token_adapter.base_layer.weight"
ENDS = (*PARTS, *TOKENS, TOKENS_BASE)
_FRONT = re.compile(rf"((?:{'|'.join(WRAPPERS)})\.)*{re.escape(PREFIX)}")
_DEFAULT = re.compile(r"\.default(?=(\.weight|\.bias)?$)")
"""The adapter's name, which PEFT takes out when it saves and other programs leave in."""
_SAVED = re.compile(r"(.+)\.(modules_to_save(?:\.default)?|original_module)(\..+)")


def plain(name: str, parts: Collection[str] = PARTS) -> str:
    """Return a tensor's name without PEFT's prefix and without the adapter's name; `parts` are ends of names."""
    if name.startswith(PREFIX):  # nearly always
        name = name[len(PREFIX) :]
    elif match := _FRONT.match(name):
        name = name[match.end() :]
    if ".default" not in name or part_of(name, parts)[1]:
        return name
    bare = _DEFAULT.sub("", name)
    return bare if part_of(bare, parts)[1] else name


def taken_apart(name: str, parts: Collection[str] = PARTS) -> tuple[str, str]:
    """Return the module of a tensor's name, and the end that PEFT added; "" for a tensor of the model itself."""
    at = name.rfind(".lora_")
    if parts is PARTS and name[at:] in PARTS and name.startswith(PREFIX):  # nearly always
        return name[len(PREFIX) : at], name[at:]
    return part_of(plain(name, parts), parts)


def part_of(name: str, parts: Collection[str] = PARTS) -> tuple[str, str]:
    """Return the module of a plain name, and the end that PEFT added; "" for a tensor of the model itself."""
    for end in ENDS if parts is PARTS else (*parts, *TOKENS, TOKENS_BASE):
        if name.endswith(end):
            return name[: -len(end)], end
    return name, ""


def wrapped_whole(name: str) -> tuple[str, str, str] | None:
    """Return the module, PEFT's word and the rest of a name that may be of a module saved whole."""
    return match.groups() if (match := _SAVED.fullmatch(name)) else None  # type: ignore[return-value] # three groups


def in_model(name: str, wrapped: Collection[str]) -> str:
    """Return the model's own name of a tensor that a trainer named as the running PEFT model does."""
    target = plain(name)
    whole = wrapped_whole(target)
    return without_base_layer(whole[0] + whole[2] if whole else target, wrapped)


def without_base_layer(name: str, wrapped: Collection[str]) -> str:
    """Return a name without each `base_layer` that follows the name of a wrapped module."""
    parts = name.split(".")
    kept = [part for k, part in enumerate(parts) if not (part == "base_layer" and ".".join(parts[:k]) in wrapped)]
    return ".".join(kept)


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
    names = [weights[module] for module in targets_of(config, weights, is_linear) if module not in pruned]
    names += [name for name in shapes if config.modules_to_save and config.saves(name)]
    return [*names, *(weights[module] for module in _embeddings(config, weights))]


def is_usual(config: Config, modules: Collection[str]) -> bool:
    """Return True if a config clearly targets the modules that have factors, and says nothing rare about them."""
    if config.rank_pattern or config.alpha_pattern or config.layers_to_transform or config.exclude_modules:
        return False
    ends = tuple(f".{name}" for name in config.modules)
    everything = targets_everything(config) and not config.modules_to_save
    return config.alpha >= 0 and (everything or all(f".{module}".endswith(ends) for module in modules))


def targets_everything(config: Config) -> bool:
    """Return True if target_modules means all linear layers."""
    return str(config.target_modules).lower() == "all-linear"


def targets_of(config: Config, weights: Mapping[str, str], is_linear: Callable[[str], bool]) -> Iterator[str]:
    """Yield the modules that target_modules and its exceptions leave."""
    target = config.target_modules
    if targets_everything(config):
        chosen: Callable[[str], object] = lambda module: is_linear(weights[module])  # noqa: E731
    else:
        chosen = _chooser(target, weights, "target_modules")
    excluded = _chooser(config.exclude_modules, weights, "exclude_modules")
    in_layers = (lambda _: True) if isinstance(target, str) else _layers(config, weights)
    saved = tuple(f".{name}." for name in config.modules_to_save)
    for module in weights:
        within = saved and any(name in f".{module}." for name in saved)
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
