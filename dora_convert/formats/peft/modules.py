"""PEFT's tensors of one module made into updates: which weight they are for, at which rank and scaling."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from ...adapters.adapter import Change
from ...adapters.updates import Decomposed, Delta, LowRank, Start, Update
from ...errors import Fault
from ...storage.safetensors import FLOATS, StoredTensor
from .config import Config

Parts = Mapping[str, StoredTensor]
REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""Parameters of experts in the order that their modules register them: PEFT wraps the first one innermost."""
_CALLED = {"A": "lora_A", "B": "lora_B", "d": "lora_E"}
TWICE_UNTIL = (0, 21, 2)
"""PEFT up to this version added MultiheadAttention's out_proj twice, in training too."""


class _Place(NamedTuple):
    """Which weight a module's tensors are for; `among` which ones, where only shapes can tell."""

    key: str  # what rank_pattern and alpha_pattern match
    target: str
    times: int = 1  # how often training added them
    among: tuple[str, ...] = ()


def updates_of(
    modules: Mapping[str, Parts], saved: Collection[str], config: Config
) -> Iterator[Change | Fault | dict[str, str]]:
    """Every module's changes, faults, or tensors to ignore with the reason.

    `saved` weights come whole with the adapter, as training began with them.
    """
    depths = _depths(modules)
    for module, parts in modules.items():
        place = _place(module, depths, config)
        if isinstance(place, Fault):
            yield place
            continue
        key, target = place.key, place.target
        if config.adalora and all(0 in part.shape for part in parts.values()):
            yield {part.name: "AdaLoRA pruned it to rank 0" for part in parts.values()}
        elif why := _contradiction(key, parts, config):
            yield Fault(module, why)
        else:
            start = None if target in saved else config.start
            rule = config.rule(key) + (", twice" if place.times == 2 else "")
            yield Change(target, _update(key, parts, config, place.times, start), place.among, rule)
            if bias := parts.get("b"):
                target = f"{target.rpartition('.')[0]}.bias"
                yield Change(target, Delta(bias, config.scaling(key)), rule=rule)


def _depths(modules: Mapping[str, Parts]) -> dict[str, list[int]]:
    """How deep each module is wrapped: the numbers of `.base_layer` that follow its name."""
    depths: dict[str, list[int]] = {}
    for module in modules:
        plain = re.sub(r"(\.base_layer)+$", "", module)
        depths.setdefault(plain, []).append((len(module) - len(plain)) // len(".base_layer"))
    return depths


def _place(module: str, depths: Mapping[str, list[int]], config: Config) -> _Place | Fault:
    """Which weight a module's tensors are for."""
    plain = re.sub(r"(\.base_layer)+$", "", module)
    if ".base_layer." in plain:  # MultiheadAttention wraps its out_proj, whose rank and alpha are its own
        outer, _, inner = plain.rpartition(".base_layer.")
        return _Place(outer, f"{outer}.{inner}.weight", 2 if config.version <= TWICE_UNTIL else 1)
    leaves = _parameters(plain, config)
    if not leaves:
        return _Place(plain, f"{plain}.weight")
    depth = (len(module) - len(plain)) // len(".base_layer")
    if len(depths[plain]) != len(leaves):
        return Fault(module, f"is wrapped {len(depths[plain])} times for {', '.join(leaves)}")
    known = len(leaves) == 1 or set(leaves) <= set(REGISTERED)
    leaf = (sorted(leaves, key=REGISTERED.index) if known and len(leaves) > 1 else leaves)[-1 - depth]
    return _Place(
        f"{plain}.{leaf}",
        f"{plain}.{leaf}",
        among=() if known else tuple(f"{plain}.{name}" for name in leaves),
    )


def _parameters(module: str, config: Config) -> list[str]:
    """The leaves of `target_parameters` that may be meant for a module."""
    if any(f".{module}".endswith(f".{name}") for name in config.modules):
        return []
    found = []
    for name in config.parameters:
        owner, _, leaf = name.rpartition(".")
        if (not owner or f".{module}".endswith(f".{owner}")) and leaf not in found:
            found.append(leaf)
    return found


def _update(key: str, parts: Parts, config: Config, times: int, start: Start | None) -> Update:
    A = parts["A"]
    rank = config.rank(key)
    experts = A.shape[0] // rank if config.parameters and A.shape[0] != rank else 0
    update = LowRank(
        A,
        parts["B"],
        times * config.scaling(key),
        transposed=_orientation(A),
        d=parts.get("d"),
        blocks=config.blocks(key),
        experts=experts,
        square=config.square_experts(),
        start=start if _is_linear(A) else None,
    )
    return Decomposed(update, parts["m"]) if "m" in parts else update


def _is_linear(A: StoredTensor) -> bool:
    """Whether PEFT's other starts apply: embeddings and convolutions begin as usual."""
    return len(A.shape) == 2 and not re.search(r"\.lora_embedding_A\b", A.name)


def _orientation(A: StoredTensor) -> bool | None:
    if re.search(r"\.lora_embedding_A\b", A.name):
        return True
    return None if len(A.shape) == 2 else False


def _contradiction(key: str, parts: Parts, config: Config) -> str | None:
    """Why a module's tensors make no update, or None where they do."""
    diagonal = {"d"} if config.adalora or config.start is Start.KASA else set()
    if missing := sorted(({"A", "B"} | diagonal) - parts.keys()):
        return f"has no {_CALLED[missing[0]] if missing[0] != 'd' or config.adalora else 'lora_diag'}"
    if "d" in parts and not diagonal:
        return "has a diagonal, as AdaLoRA and KaSA have; the config says it is neither"
    if odd := [part for part in parts.values() if part.dtype not in FLOATS]:
        return f"is stored as {odd[0].dtype}; adapters of that dtype are not merged"
    if ("m" in parts) != config.use_dora:
        if config.use_dora:
            return "use_dora is set, but there is no lora_magnitude_vector"
        return "there is a lora_magnitude_vector, but use_dora is not set"
    if "b" in parts and config.use_dora:
        return "DoRA has no bias on lora_B"
    return _wrong_rank(key, parts, config)


def _wrong_rank(key: str, parts: Parts, config: Config) -> str | None:
    A, B, rank = parts["A"].shape, parts["B"].shape, config.rank(key)
    shapes = f"lora_A is {A} and lora_B is {B}"
    if len(A) < 2 or len(B) < 2:
        return f"{shapes}: not matrices"
    on_B = config.blocks(key)[1]
    if config.adalora:
        return (
            None if A[0] == B[1] == parts["d"].numel else f"{shapes}, lora_E has {parts['d'].numel} elements"
        )
    if len(A) > 2 and B[1] < rank == A[0]:
        return "a grouped convolution: its lora_A reads all input channels, which no grouped weight can"
    if config.parameters and A[0] == B[1] and A[0] % rank == 0:
        return None
    if not A[0] == B[1] * on_B == rank:
        return f"the config says rank {rank}; {shapes}"
    if "d" in parts and parts["d"].numel != rank:
        return f"lora_diag has {parts['d'].numel} elements for rank {rank}"
    return None
