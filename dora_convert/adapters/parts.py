"""Help formats to read: sort tensors by the ends of their names, cut and turn them, and read single numbers."""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import Fault, UnsupportedError
from ..storage.checkpoint import Checkpoint
from ..storage.file_view import FileView
from ..storage.refs import Source
from ..storage.safetensors import FLOATS, StoredTensor
from ..storage.stored_view import view
from . import Adapter, Change, Decomposed

Parts = dict[str, StoredTensor]
_FORMATS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "U8": "B"}
"""struct's letters of the dtypes that a single number is stored in."""
EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared)$")
"""Names of modules that are embeddings in all models."""


@dataclass
class Findings:
    """The content of an adapter, while a format reads it."""

    changes: list[Change] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)

    def fault(self, tensors: Iterable[StoredTensor], why: str) -> None:
        """Note why some tensors make no update."""
        self.faults += [Fault(tensor.name, why) for tensor in tensors]

    def adapter(self, view: FileView, files: Sequence[str], source: Source, **facts: object) -> Adapter:
        """Return the adapter whose tensors lie in some files of a view; the first files hold the tensors."""
        tensors: dict[str, StoredTensor] = {}
        for name in files:
            for key, tensor in view.tensors(name).items():
                tensors[key if key not in tensors else f"{name}: {key}"] = tensor
        return Adapter(
            source=source,
            changes=tuple(self.changes),
            faults=tuple(self.faults),
            ignored=self.ignored,
            tensors=tensors,
            files=tuple(view.path(name) for name in files),
            **facts,  # type: ignore[arg-type] # fields of an adapter
        )


def sort_parts(
    tensors: Mapping[str, StoredTensor], ends: Mapping[str, str]
) -> tuple[dict[str, Parts], dict[str, StoredTensor]]:
    """Return the parts of each module, by the ends of the tensors' names, and the tensors without such an end."""
    modules: dict[str, Parts] = {}
    rest: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None:
            rest[name] = tensor
        else:
            modules.setdefault(name.removesuffix(end), {})[ends[end]] = tensor
    return modules, rest


def wrong_parts(
    parts: Parts, needed: Collection[str], names: Mapping[str, str], integers: Collection[str] = ("alpha",)
) -> str | None:
    """Return why parts of a module make no update: one is missing, empty, or of another dtype; None if they do.

    The parts in `integers` may have any dtype.
    """
    ends = {part: end for end, part in reversed(list(names.items()))}
    if missing := sorted(set(needed) - parts.keys()):
        return f"has no {ends[missing[0]].strip('.')}"
    if empty := [part for part in parts.values() if 0 in part.shape]:
        return f"{empty[0].name} is empty"
    odd = [tensor for part, tensor in parts.items() if tensor.dtype not in FLOATS and part not in integers]
    return f"is stored as {odd[0].dtype}; adapters of that dtype are not merged" if odd else None


def read_number(tensor: StoredTensor) -> float:
    """Return the value of a tensor with one element.

    Raises UnsupportedError for a tensor with several, or of another dtype.
    """
    if tensor.numel != 1 or not (tensor.dtype in _FORMATS or tensor.dtype == "BF16"):
        raise UnsupportedError(f"{tensor.path}: {tensor.name} is not a single number.")
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        raw = file.read(tensor.nbytes)
    if tensor.dtype == "BF16":  # the upper half of a float32
        raw, letter = b"\0\0" + raw, "f"
    else:
        letter = _FORMATS[tensor.dtype]
    (value,) = struct.unpack(f"<{letter}", raw)
    return float(value)


def rows_of(tensor: StoredTensor, start: int, stop: int) -> StoredTensor:
    """Return some rows of a stored tensor as a tensor."""
    size = tensor.nbytes // max(1, tensor.shape[0])
    return replace(tensor, shape=(stop - start, *tensor.shape[1:]), start=tensor.start + start * size)


def item_of(tensor: StoredTensor, number: int) -> StoredTensor:
    """Return one matrix of a stack of matrices."""
    return replace(rows_of(tensor, number, number + 1), shape=tensor.shape[1:])


def flat(tensor: StoredTensor) -> StoredTensor:
    """Return a factor of a 1×1 convolution as a matrix; any other tensor as it is."""
    is_point = len(tensor.shape) > 2 and all(size == 1 for size in tensor.shape[2:])
    return replace(tensor, shape=tensor.shape[:2]) if is_point else tensor


def is_embedding(module: str) -> bool:
    """Return True if a module is an embedding, by its name."""
    return EMBEDDING.search(module) is not None


def turned(tensor: StoredTensor) -> StoredTensor:
    """Return a stored matrix as its transpose."""
    return view(tensor, turned=True)


def follow(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter with a change for each bias that the base has beside a decomposed weight.

    In some tools the bias is inside the norm: m/‖V‖ multiplies weight and bias.
    """
    from .kinds import Follows

    weights = [change.target for change in adapter.changes if isinstance(change.update, Decomposed)]
    named = {f".{name}" for name in base.tensors if name.endswith(".bias")}
    ends = {name[at:] for name in named for at, char in enumerate(name) if char == "."}
    biases = [(f"{weight.removesuffix('.weight')}.bias", weight) for weight in weights]
    follows = tuple(
        Change(bias, Follows(weight), rule="as its weight") for bias, weight in biases if f".{bias}" in ends
    )
    return replace(adapter, changes=(*adapter.changes, *follows))
