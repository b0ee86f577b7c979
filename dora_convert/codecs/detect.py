"""Find the coded tensors of a base, and show the base as if it were dense. The list of kinds is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..storage.checkpoint import Checkpoint, Shard
from ..storage.safetensors import StoredTensor
from . import awq, bitsandbytes, compressed, fp8, gguf, gpt_oss, gptq, mlx, modelopt, torchao
from .coded import CodedTensor
from .evidence import Evidence

CODECS = (compressed, modelopt, torchao, bitsandbytes, gpt_oss, gptq, awq, mlx, gguf, fp8)
"""Every kind that is read. The first that claims a tensor has it."""


def find_coded(base: Checkpoint, dtype: str | None = None) -> dict[str, CodedTensor]:
    """Return the coded tensors of a base by the names of their dense weights.

    `dtype` is the caller's dtype for dense weights, if there is one.
    """
    evidence, coded, taken = Evidence(base, dtype), dict[str, CodedTensor](), set[str]()
    for codec in CODECS:
        for tensor in codec.claim(evidence):
            names = {part.name for part in tensor.parts.values()}
            if names.isdisjoint(taken):
                coded[tensor.name] = tensor
                taken |= names
    return coded


def with_dense(base: Checkpoint, coded: Mapping[str, CodedTensor]) -> Checkpoint:
    """Return the base with each coded tensor in its codes' place, and without its other parts."""
    by_codes = {tensor.named("codes"): tensor for tensor in coded.values()}
    parts = {part.name for tensor in coded.values() for part in tensor.parts.values()}

    def dense(shard: Shard) -> Shard:
        seen: Sequence[StoredTensor] = [
            by_codes.get(tensor.name, tensor)
            for tensor in shard.tensors
            if tensor.name in by_codes or tensor.name not in parts
        ]
        return replace(shard, tensors=tuple(seen))

    return replace(base, shards=tuple(map(dense, base.shards)))
