"""Take a checkpoint's census: its tensors, its config, and the receipts of earlier merges."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from ...codecs.coded import CodedTensor
from ...codecs.detect import find_coded, with_dense
from ...codecs.evidence import Evidence
from ...errors import MalformedError
from ...naming.resolve import find_tie
from ...output.receipt import Receipt, read_receipt
from ...reports.checkpoint import CheckpointReport
from ...storage.checkpoint import Checkpoint, Shard
from ...storage.filenames import RECORD
from ...storage.refs import Source
from ...storage.safetensors import StoredTensor
from .checkpoint_advice import advise_on_checkpoint

PACKED = frozenset({"qweight", "weight_packed", "absmax", "SCB", "weight_scale", "weight_scale_inv"})
"""Last names of tensors that only quantised weights have."""
_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


def census(base: Checkpoint, started: float) -> CheckpointReport:
    """Return the report of a checkpoint's headers, config and receipts, begun at the time `started`."""
    config, entry = base.config or {}, base.index_name or base.shards[0].filename
    named, model_type, tie = config.get("architectures"), config.get("model_type"), find_tie(base)
    coded = find_coded(base) if base.may_be_quantised else {}
    quantised, merges = _quantised(base, coded), list(_merges(base.root))
    notes = [*base.notes, *_doubts(base, quantised)]
    return CheckpointReport(
        kind="checkpoint",
        format=_format(base, entry),
        architectures=tuple(map(str, named)) if isinstance(named, list) else (),
        model_type=model_type if isinstance(model_type, str) else None,
        shards=tuple(
            {"file": _file(base, shard), "tensors": len(shard.tensors), "bytes": _totals(shard.tensors)["bytes"]}
            for shard in base.shards
        ),
        index=None if base.gguf else base.index_name,
        tied={"embedding": tie.embedding, "head": tie.head, "head_stored": tie.stored} if tie else None,
        quantised=quantised,
        side_files=base.side_files,
        left_behind=base.left_behind,
        merges=tuple(merges),
        **advise_on_checkpoint(base, quantised),
        **common(base.source, base.tensors.values(), notes, started)
        | {"parameters": _totals(with_dense(base, coded).tensors.values())["parameters"]},
    )


def _format(base: Checkpoint, entry: str) -> str:
    """Return the kind of the weight files."""
    safe = entry.removesuffix(".index.json").endswith(".safetensors")
    return "GGUF" if base.gguf else "safetensors" if safe else "torch pickle"


def _file(base: Checkpoint, shard: Shard) -> str:
    """Return the name of a weight file."""
    return shard.tensors[0].path.name if base.gguf and shard.tensors else shard.filename


def _doubts(base: Checkpoint, quantised: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a note on everything odd in a checkpoint."""
    if base.config is None:
        yield "config.json not found: the kind of model is unknown, and so is a tie of its embedding"
    if quantised and quantised["tensor"]:
        yield f"{quantised['tensor']} looks quantised, but config.json does not say so"
    if part := next((name for name in base.tensors if ".lora_" in name), None):
        yield f"{part} is an adapter's, but the files are not an adapter of a known format"


def _quantised(base: Checkpoint, coded: Mapping[str, CodedTensor]) -> dict[str, Any] | None:
    """Return all that tells of quantised weights, else the first tensor that looks quantised."""
    for details in Evidence(base).methods:
        method = str(details.get("quant_method") or _named(coded))
        return {"method": method, "bits": _bits(details), "tensor": None}
    if coded:
        return {"method": _named(coded), "bits": None, "tensor": None}
    for name, tensor in base.tensors.items():
        if name.rpartition(".")[2] in PACKED or tensor.dtype.startswith(("F8", "F6", "F4")):
            return {"method": "unknown", "bits": None, "tensor": name}
    return None


def _named(coded: Mapping[str, CodedTensor]) -> str:
    """Return the tool of the first coded weight, for configs that do not name theirs."""
    return next((tensor.scheme.title.partition(" ")[0] for tensor in coded.values()), "unknown")


def _bits(details: Mapping[str, Any]) -> int | None:
    bits = details.get("bits", details.get("w_bit"))
    by_flag = {"load_in_4bit": 4, "load_in_8bit": 8}
    bits = bits or next((number for flag, number in by_flag.items() if details.get(flag) is True), None)
    return bits if type(bits) is int else 8 if details.get("quant_method") == "fp8" else None


def _merges(root: Path) -> Iterator[dict[str, Any]]:
    """Yield the facts of the receipts; each merge keeps earlier receipts in a sub-folder."""
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


def common(source: Source, tensors: Collection[StoredTensor], notes: Sequence[str], started: float) -> dict[str, Any]:
    """Return the fields that all reports have."""
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
    """Return a name with its layer numbers replaced by `*`."""
    return _NUMBER.sub("*", name)
