"""Check each form of module once: the shapes of its tensors, and the numbers that the config gives it.

An adapter may have tens of thousands of modules of a handful of forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ...adapters import Start
from ...storage.safetensors import FLOATS, StoredTensor
from .config import Config

PREFIX = "base_model.model."
Parts = Mapping[str, StoredTensor]
EMPTY = "is empty: ZeRO-3 leaves such tensors if it does not gather them (stage3_gather_16bit_weights_on_model_save)"
_CALLED = {"A": "lora_A", "B": "lora_B", "d": "lora_E"}


class Numbers(NamedTuple):
    """The numbers that the config gives a module."""

    rank: int
    scaling: float
    rule: str
    """The formula of the scaling, for people."""
    blocks: tuple[int, int]
    """The numbers of diagonal blocks of A and B."""


class Forms:
    """The forms of an adapter's modules that make updates."""

    def __init__(self, config: Config) -> None:
        self._config = config
        blocks = config.block_diagonal
        differ = config.rank_pattern or config.alpha_pattern or blocks.target_modules_bd_a or blocks.target_modules_bd_b
        self._usual = None if differ else self._numbers("")
        """The numbers of every module, if no module has its own."""
        self._sound: set[tuple[object, ...]] = set()

    def find(self, key: str, parts: Parts) -> Numbers | str:
        """Return the numbers of a module whose tensors make an update, or the reason why they make none."""
        numbers = self._usual or self._numbers(key)
        form = (numbers, *parts, *[(part.dtype, part.shape) for part in parts.values()])
        if form not in self._sound:
            if why := _contradiction(key, parts, self._config, numbers):
                return why
            self._sound.add(form)
        return numbers

    def _numbers(self, key: str) -> Numbers:
        config = self._config
        return Numbers(config.rank(key), config.scaling(key), config.rule(key), config.blocks(key))


def _contradiction(key: str, parts: Parts, config: Config, numbers: Numbers) -> str | None:
    """Return why a module's tensors make no update; None if they do."""
    diagonal = config.adalora or config.start is Start.KASA
    if missing := sorted(({"A", "B", "d"} if diagonal else {"A", "B"}) - parts.keys()):
        return f"has no {_CALLED[missing[0]] if missing[0] != 'd' or config.adalora else 'lora_diag'}"
    if empty := [part for part in parts.values() if 0 in part.shape]:
        return f"its {empty[0].name.removeprefix(PREFIX).removeprefix(key).lstrip('.')} {EMPTY}"
    if "d" in parts and not diagonal:
        return "has a diagonal, as AdaLoRA and KaSA have; the config says it is neither"
    if odd := [part for part in parts.values() if part.dtype not in FLOATS]:
        return f"is stored as {odd[0].dtype}; adapters of that dtype are not merged"
    if config.use_dora and "m" not in parts:
        return "use_dora is set, but the module has no lora_magnitude_vector"
    if "m" in parts and not config.use_dora:
        return "has a lora_magnitude_vector, but use_dora is not set"
    if "b" in parts and config.use_dora:
        return "DoRA has no bias on lora_B"
    return _wrong_rank(parts, config, numbers)


def _wrong_rank(parts: Parts, config: Config, numbers: Numbers) -> str | None:
    """Return why the shapes contradict the config's rank; None if they do not."""
    A, B, rank, on_B = parts["A"].shape, parts["B"].shape, numbers.rank, numbers.blocks[1]
    shapes = f"lora_A is {A} and lora_B is {B}"
    if len(A) < 2 or len(B) < 2:
        return f"{shapes}: not matrices"
    if config.adalora:
        count = parts["d"].numel
        return None if A[0] == B[1] == count else f"{shapes}, lora_E has {count} elements"
    if len(A) > 2 and B[1] < rank == A[0]:
        return "a grouped convolution: its lora_A reads all input channels, which no grouped weight can"
    if config.parameters and A[0] == B[1] and A[0] % rank == 0:
        return None
    if not A[0] == B[1] * on_B == rank:
        return f"the config says rank {rank}; {shapes}"
    if "d" in parts and parts["d"].numel != rank:
        return f"lora_diag has {parts['d'].numel} elements for rank {rank}"
    return None
