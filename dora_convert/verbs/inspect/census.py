"""What a checkpoint is: its tensors counted, and what its config and the receipts of earlier merges say."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from ...errors import MalformedError
from ...naming.ties import Tie, find_tie
from ...output.receipt import Receipt, read_receipt
from ...reports.inspect import CheckpointReport
from ...storage.checkpoint import Checkpoint
from ...storage.filenames import RECORD
from ...storage.refs import Source
from ...storage.safetensors import StoredTensor

QUANTISED = ("quantization_config", "compression_config")
"""Where configs say how weights are quantised."""
PACKED = frozenset({"qweight", "weight_packed", "absmax", "SCB", "weight_scale", "weight_scale_inv"})
"""What tensors are called that only quantised weights have."""
_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


def census(base: Checkpoint, started: float) -> CheckpointReport:
    """What a checkpoint's headers, config and receipts tell; `started` is when the looking began."""
    config, entry = base.config or {}, base.index_name or base.shards[0].filename
    named = config.get("architectures")
    model_type = config.get("model_type")
    quantised, merges = _quantised(base), list(_merges(base.root))
    notes = [*base.notes, *_doubts(base, quantised)]
    return CheckpointReport(
        kind="checkpoint",
        format="safetensors"
        if entry.removesuffix(".index.json").endswith(".safetensors")
        else "torch pickle",
        architectures=tuple(map(str, named)) if isinstance(named, list) else (),
        model_type=model_type if isinstance(model_type, str) else None,
        shards=tuple(
            {"file": shard.filename, "tensors": len(shard.tensors), "bytes": _totals(shard.tensors)["bytes"]}
            for shard in base.shards
        ),
        index=base.index_name,
        tied=_tied(find_tie(base)),
        quantised=quantised,
        side_files=base.side_files,
        left_behind=base.left_behind,
        merges=tuple(merges),
        **common(base.source, base.tensors.values(), notes, started),
    )


def _tied(tie: Tie | None) -> dict[str, Any] | None:
    if tie is None:
        return None
    return {"embedding": tie.embedding, "head": tie.head, "head_stored": tie.stored}


def _doubts(base: Checkpoint, quantised: Mapping[str, Any] | None) -> Iterator[str]:
    """What looks odd in a checkpoint."""
    if base.config is None:
        yield "there is no config.json, so what kind of model it is, and whether it ties its embedding, is not known"
    if quantised and quantised["tensor"]:
        yield f"{quantised['tensor']} looks quantised, but config.json does not say so"
    if part := next((name for name in base.tensors if ".lora_" in name), None):
        yield f"{part} is an adapter's, but there is no adapter_config.json"


def _quantised(base: Checkpoint) -> dict[str, Any] | None:
    """How the config says that weights are quantised, or else the first tensor that looks so."""
    for config in base.configs:
        for key in QUANTISED:
            if isinstance(found := config.get(key), Mapping):
                return {
                    "method": str(found.get("quant_method", "unknown")),
                    "bits": _bits(found),
                    "tensor": None,
                }
    for name, tensor in base.tensors.items():
        if name.rpartition(".")[2] in PACKED or tensor.dtype.startswith(("F8", "F6", "F4")):
            return {"method": "unknown", "bits": None, "tensor": name}
    return None


def _bits(found: Mapping[str, Any]) -> int | None:
    bits = found.get("bits", found.get("w_bit"))
    by_flag = {"load_in_4bit": 4, "load_in_8bit": 8}
    bits = bits or next((number for flag, number in by_flag.items() if found.get(flag) is True), None)
    return bits if type(bits) is int else 8 if found.get("quant_method") == "fp8" else None


def _merges(root: Path) -> Iterator[dict[str, Any]]:
    """What the receipts beside the weights say; each merge keeps those before it in a folder of its own record."""
    folder = root / RECORD
    try:
        while receipt := read_receipt(folder):
            yield _merge(receipt)
            folder /= "previous"
    except MalformedError as error:
        yield {"error": error.message}


def _merge(receipt: Receipt) -> dict[str, Any]:
    """Return the parts of a receipt that tell who merged what."""
    chosen = ("name", "repo", "commit", "format", "kind", "weight")
    return {
        "verb": receipt.verb or None,
        "versions": receipt.versions,
        "base": to_builtins(receipt.base),
        "adapters": [{key: to_builtins(adapter).get(key) for key in chosen} for adapter in receipt.adapters],
        "undo": receipt.options.undo,
        "dtype": receipt.options.dtype,
        "tensors": dict(Counter(entry.fate for entry in receipt.tensors.values())),
    }


def common(
    source: Source, tensors: Collection[StoredTensor], notes: Sequence[str], started: float
) -> dict[str, Any]:
    """The fields that all reports have."""
    dtypes: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        dtypes.setdefault(tensor.dtype, []).append(tensor)
    return {
        "title": source.title,
        "ref": source.address,
        "repo": source.repo,
        "commit": source.commit,
        **_totals(tensors),
        "dtypes": {name: _totals(dtypes[name]) for name in sorted(dtypes)},
        "weights": _kinds(tensors),
        "notes": tuple(notes),
        "seconds": round(time.monotonic() - started, 3),
    }


def _totals(tensors: Collection[StoredTensor]) -> dict[str, int]:
    distinct = {(tensor.path, tensor.start, tensor.nbytes): tensor for tensor in tensors}.values()
    return {
        "tensors": len(tensors),
        "parameters": sum(tensor.numel for tensor in distinct),
        "bytes": sum(tensor.nbytes for tensor in distinct),
    }


def _kinds(tensors: Collection[StoredTensor]) -> tuple[Mapping[str, Any], ...]:
    counts = Counter((fold(tensor.name), tensor.dtype, tensor.shape) for tensor in tensors)
    return tuple(
        {"kind": kind, "dtype": dtype, "shape": shape, "tensors": count}
        for (kind, dtype, shape), count in counts.items()
    )


def fold(name: str) -> str:
    """A name with the numbers of its layers as `*`."""
    return _NUMBER.sub("*", name)
