"""Write PEFT's adapter folders: the same files and names that the package reads.

An adapter made from another one keeps that adapter's config fields and tensor names; a new tensor is named by
the weight that it is for. If ranks differ from the old config's, `r` is the largest rank and `lora_alpha`
makes the scaling 1, so that a server without patterns is right, too. Every other module then has its own key
in `rank_pattern` and `alpha_pattern`: the module's name, escaped, from ^ to $.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...adapters import Adapter, Change, Decomposed, Delta, Full, LowRank, Rows, Start, low_rank, unwrapped
from ...adapters.new_adapter import Files, NewAdapter
from ...adapters.writing import refuse_others
from ...errors import UnsupportedError
from ...storage.json_files import read_json
from ...storage.safetensors import StoredTensor
from .config import LORA, SCHEDULE, TASKS, Config
from .forms import PREFIX
from .modules import CONFIG, TOKENS, WEIGHTS, part_of, plain

MAGNITUDE = ".lora_magnitude_vector"
VERSION = "0.21.2"
"""The version of PEFT whose way round square experts are written."""
_FRESH: Mapping[str, Any] = {
    "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "revision": None,
    "inference_mode": True, "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": [],
    "modules_to_save": None, "bias": "none", "use_dora": False, "use_rslora": False,
    "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False,
}  # fmt: skip
_CLASSIFIERS = ("classifier", "score")
_HEADS = {"SEQ_CLS": _CLASSIFIERS, "TOKEN_CLS": _CLASSIFIERS, "QUESTION_ANS": ("qa_outputs",)}
"""The modules that PEFT expects to be saved whole for a task, by the ends of their names."""


def save(new: NewAdapter) -> Files:
    """Return the files of an adapter folder; UnsupportedError for changes of other tools that PEFT does not have."""
    if not (new.like and new.like.format == "peft"):
        refuse_others(new, "peft")
    tensors = {name: stored for change in new.changes for name, stored in _named(change, new)}
    config = json.dumps(_config(new), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    keep = frozenset(name for name in tensors if name.endswith((MAGNITUDE, f"{MAGNITUDE}.weight")))
    return Files(WEIGHTS[0], dict(sorted(tensors.items())), {CONFIG: config.encode()}, keep=keep)


def shares_rank(change: Change, tensor: str, like: Adapter) -> str | None:
    """Return why a weight's factors must keep their rank, which weights share; None if they need not."""
    low, (_, config) = low_rank(change.update), _of(like)
    if not low:
        return None
    if tensor.endswith("in_proj_weight") or _attention(change, low):
        return "a part of MultiheadAttention"
    if low.experts or (config and _is_parameter(change.target, config)):
        return "a parameter, not a layer's weight (target_parameters)"
    return None


def objection(change: Change, tensor: str, like: Adapter) -> str | None:
    """Return why PEFT cannot load a LoRA as a DoRA; None if it can. `tensor` is the weight in the base."""
    low, (raw, config) = low_rank(change.update), _of(like)
    if not low:
        return f"is {change.update.title}: to-lora makes a LoRA of it first"
    if low.b or low.widest:
        return "is VeRA: to-lora makes a LoRA of it first"
    if config and config.adalora:
        return "AdaLoRA has no DoRA: to-lora makes a LoRA of it first"
    if why := shares_rank(change, tensor, like):
        return why
    if low.blocks != (1, 1):
        return "block-diagonal (use_bdlora): to-lora makes a LoRA of it first"
    if low.start is Start.KASA:
        return "KaSA has no DoRA: to-lora makes a LoRA of it first"
    if raw.get("lora_bias"):
        return "has a bias on lora_B (lora_bias)"
    return "DoRA does not go with megatron_config" if raw.get("megatron_config") else None


def _named(change: Change, new: NewAdapter) -> Iterator[tuple[str, StoredTensor]]:
    """Yield each tensor of a change under its name in the file."""
    module = PREFIX + change.module
    if change.target in new.parameters:
        module += ".base_layer" * _wrappers_around(change.target, new)
    update = change.update

    def name(stored: StoredTensor, suffix: str) -> tuple[str, StoredTensor]:
        own = new.like is not None and new.like.format == "peft" and new.like.tensors.get(stored.name) is stored
        return (PREFIX + _own_name(change, plain(stored.name)) if own else module + suffix, stored)

    match update:
        case LowRank(b=None) | Decomposed(LowRank(b=None)):
            low = low_rank(update)
            assert low
            yield name(low.A, ".lora_embedding_A" if low.transposed else ".lora_A.weight")
            yield name(low.B, ".lora_embedding_B" if low.transposed else ".lora_B.weight")
            if low.d:
                yield name(low.d, ".lora_diag")
            if isinstance(update, Decomposed):
                yield name(update.m, MAGNITUDE)
        case Delta(value):
            yield name(value, ".lora_B.bias")
        case Rows(value):
            yield name(value, TOKENS[0])
        case Full(value):
            leaf = change.target.rpartition(".")[2]
            wrapped = leaf == "bias" and any(
                other.target == f"{module.removeprefix(PREFIX)}.weight" for other, _ in new.low_ranks
            )
            yield name(value, f"{'.base_layer' if wrapped else ''}.{leaf}")
        case _:
            raise UnsupportedError(f"{change.target} is changed by {update.title}, which a LoRA of PEFT cannot hold.")


def _wrappers_around(target: str, new: NewAdapter) -> int:
    """Return the number of PEFT's wrappers around the one for a parameter: those of parameters registered later."""
    from .parameters import REGISTERED

    module, _, leaf = target.rpartition(".")
    others = {other.rpartition(".")[2] for other in new.parameters if other.rpartition(".")[0] == module}
    known = [each for each in REGISTERED if each in others]
    return len(known[known.index(leaf) + 1 :]) if leaf in known else 0


def _of(like: Adapter | None) -> tuple[dict[str, Any], Config | None]:
    """Return the config of a LoRA in this format: as the file has it, and parsed."""
    if like is None or like.format != "peft":
        return {}, None
    path = like.source.path / CONFIG
    raw = read_json(path)
    return (raw, Config.parse(raw, path)) if str(raw.get("peft_type")).upper() in LORA else ({}, None)


def _config(new: NewAdapter) -> dict[str, Any]:
    """Return the fields of adapter_config.json."""
    before, config = _of(new.like)
    raw = {**_FRESH, **{key: value for key, value in before.items() if key not in {"init_r", *SCHEDULE}}}
    raw |= {"peft_type": "LORA", "inference_mode": True}
    known = raw["base_model_name_or_path"] or (new.like and new.like.base)
    raw |= {"base_model_name_or_path": new.base or known}
    raw |= {"revision": new.revision or raw["revision"]} if not new.base else {"revision": new.revision}
    raw["use_dora"] = any(isinstance(change.update, Decomposed) for change in new.changes)
    raw |= _numbers(new, config) | _beginnings(new, before) | _targets(new, config) | _whole(new, config)
    if any(isinstance(change.update, Delta) for change in new.changes) != bool(raw.get("lora_bias")):
        raw["lora_bias"] = not raw.get("lora_bias")
    if not any(isinstance(change.update, Rows) for change in new.changes) and before:
        raw["trainable_token_indices"] = None
    if new.keeps_ties:
        raw["ensure_weight_tying"] = True
    if new.task and not before:
        raw |= _task(new, raw["modules_to_save"] or ())
    return raw


def _task(new: NewAdapter, saved: Collection[str]) -> dict[str, Any]:
    """Return the task of a class of models, and its head as one saved module.

    There is no task if the head is not saved whole: PEFT would look for the head among the saved modules.
    """
    task = next((task for end, task in TASKS.items() if str(new.task).endswith(end)), None)
    if not (heads := _HEADS.get(task or "")):
        return {"task_type": task}
    inside = {head: [name for name in new.besides if f"{name}.".startswith(f"{head}.")] for head in heads}
    whole = {head for head, names in inside.items() if names and set(names) <= set(saved)}
    if not whole:
        return {"task_type": None}
    others = {name for name in saved if not any(name in inside[head] for head in whole)}
    return {"task_type": task, "modules_to_save": sorted(others | whole)}


def _numbers(new: NewAdapter, config: Config | None) -> dict[str, Any]:
    """Return ranks and alphas: unchanged if all factors are, else such that every scaling comes out right."""
    if config and not config.adalora and all(new.carries(low) for _, low in new.low_ranks):
        return {}
    numbers: dict[str, tuple[int, float]] = {}
    for change, low in new.low_ranks:
        key = change.target if change.target in new.parameters else _key(change, low, config)
        own = config and new.carries(low)
        rank, scale = (config.rank(key), config.scaling(key)) if config and own else (low.rank, low.scale)
        alpha = rank * scale
        numbers[f"^{re.escape(key)}$"] = (rank, int(alpha) if alpha == int(alpha) else alpha)
    largest = max((rank for rank, _ in numbers.values()), default=1)
    return {
        "r": largest,
        "lora_alpha": largest,
        "use_rslora": False,
        "rank_pattern": {key: rank for key, (rank, _) in numbers.items() if rank != largest},
        "alpha_pattern": {key: alpha for key, (_, alpha) in numbers.items() if alpha != largest},
    }


def _key(change: Change, low: LowRank, config: Config | None) -> str:
    """Return the module that patterns match; for MultiheadAttention's out_proj, the outer module."""
    if config and _is_parameter(change.target, config):
        return change.target
    return _attention(change, low) or change.module


def _attention(change: Change, low: LowRank) -> str | None:
    """Return the MultiheadAttention that wraps an out_proj; None for the factors of other modules."""
    outer, inside, leaf = part_of(plain(low.A.name))[0].rpartition(".base_layer.")
    return outer if inside and unwrapped(f"{outer}.{leaf}") == unwrapped(change.module) else None


def _own_name(change: Change, name: str) -> str:
    """Return the name of an old adapter's tensor in a new file: as PEFT reads it, without other programs' names."""
    if isinstance(change.update, Full) and ".base_layer." not in name:
        return change.target
    return name if unwrapped(change.target) != change.target else unwrapped(name)


def _is_parameter(target: str, config: Config) -> bool:
    """Return True if a weight is adapted by `target_parameters`."""
    module = f".{target.rpartition('.')[0]}"
    named = any(f".{target}".endswith(f".{name}") for name in config.parameters)
    return named and not any(module.endswith(f".{name}") for name in config.modules)


def _beginnings(new: NewAdapter, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields about training that no longer hold for the factors, reset."""
    changed: dict[str, Any] = {key: None for key in ("velora_config", "monteclora_config") if before.get(key)}
    carried = [low for _, low in new.low_ranks if new.carries(low)]
    if not any(low.blocks != (1, 1) for low in carried) and before.get("use_bdlora"):
        changed["use_bdlora"] = None
    if not any(low.start for low in carried):
        changed |= {"kasa_config": None} if before.get("kasa_config") else {}
        start = before.get("init_lora_weights")
        changed |= {"init_lora_weights": True} if isinstance(start, str) and start != "gaussian" else {}
    return changed


def _targets(new: NewAdapter, config: Config | None) -> dict[str, Any]:
    """Return the modules that have factors, if they are not the old ones."""
    if new.targets is None and config:
        return {}
    every = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    if new.parameters:
        return _with_parameters(new)
    parameters = [change for change, _ in new.low_ranks if config and _is_parameter(change.target, config)]
    named = {} if parameters or not config or not config.parameters else {"target_parameters": None}
    modules = {_key(change, low, config) for change, low in new.low_ranks if change not in parameters}
    return {"target_modules": _matching(new, modules), **(every if config else {}), **named}


def _with_parameters(new: NewAdapter) -> dict[str, Any]:
    """Return the fields for modules and parameters; a parameter by the end of its name, if no other has it."""
    modules = {change.module for change, _ in new.low_ranks if change.target not in new.parameters}
    ends: dict[str, set[str]] = {}
    for name in new.weights:
        ends.setdefault(".".join(name.split(".")[-2:]), set()).add(name)
    short = {target: ".".join(target.split(".")[-2:]) for target in new.parameters}
    listed = {end if ends.get(end, set()) <= new.parameters else target for target, end in short.items()}
    return {
        "target_modules": _matching(new, modules) if modules else [],
        "target_parameters": sorted(listed),
        "peft_version": VERSION,
    }


def _matching(new: NewAdapter, modules: set[str]) -> list[str] | str:
    """Return the field by which PEFT finds modules: ends of their names.

    It is one pattern if the ends are ends of other modules' names, too.
    """
    names = set(new.targets or modules)
    others = (other.split(".") for other in new.besides - modules)
    if any(".".join(parts[start:]) in names for parts in others for start in range(len(parts))):
        return "|".join(re.escape(module) for module in sorted(modules))
    return sorted(names)


def _whole(new: NewAdapter, config: Config | None) -> dict[str, Any]:
    """Return the fields about tensors that are saved whole: modules, and biases alone."""
    targets = [change.target for change in new.changes if isinstance(change.update, Full)]
    if config:
        return {} if targets else {"modules_to_save": None, "bias": "none"}
    adapted = {change.module for change, _ in new.low_ranks}
    modules = {target.rpartition(".")[0] for target in targets if not target.endswith(".bias")} - adapted
    alone = {module for target in targets if (module := target.rpartition(".")[0]) not in modules}
    bias = "none" if not alone else "lora_only" if alone <= adapted else "all"
    return {"modules_to_save": sorted(modules) or None, "bias": bias}
