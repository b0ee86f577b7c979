"""GGUF: llama.cpp's files. Every tensor has llama.cpp's name, and most are blocks of codes with their scales inside.

Rows of q and k of the architecture llama lie in Meta's order: the halves of each head's rotary pairs alternate. Norms
of Gemma have one added. Codes were chosen by tools of llama.cpp, and are never made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import Fault, UnsupportedError
from ..storage.gguf_file import BlockTensor
from ..storage.gguf_model import GgufModel
from ..storage.safetensors import FLOATS, StoredTensor
from .coded import CodedTensor, PartReader, Scheme, as_matrix
from .evidence import Evidence
from .gguf_blocks import KINDS
from .gguf_names import NORMS_PLUS_ONE, ROTARY, hub_name
from .numbers import values

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ggml(Scheme):
    """Rows of blocks, or of plain numbers."""

    kind: str = "F32"
    """The type's name in llama.cpp."""
    head: int = 0
    """The rows of a head whose halves alternate on disk; 0 if rows lie in order."""
    added: int = 0
    """A number that is added on disk."""

    def fill(self, tensor: CodedTensor, read: PartReader, start: int, out: Tensor) -> None:
        """Fill `out` with rows of the dense weight's matrix from `start` on."""
        raw = self._rows(as_matrix(tensor.parts["codes"]), read, start, start + len(out))
        if self.kind in FLOATS:
            W = values(raw, self.kind).view(out.shape)
            turned = self.head and len(tensor.shape) == 1
            out.copy_(W[:, self._places(0, tensor.columns).to(W.device)] if turned else W)
        else:
            kind = KINDS[self.kind]
            blocks = raw.reshape(-1, raw.shape[1] * kind.elements // tensor.columns)
            kind.fill(blocks, out.view(-1, kind.elements))
        if self.added:
            out.sub_(self.added)

    def _rows(self, part: StoredTensor, read: PartReader, start: int, stop: int) -> Tensor:
        """Return rows as bytes, in the order of the dense weight."""
        if not self.head or part.shape[0] == 1:
            return read.rows(part, start, stop)
        stored = self._places(start, stop)
        first = int(stored.min())
        raw = read.rows(part, first, int(stored.max()) + 1)
        return raw.index_select(0, (stored - first).to(raw.device))

    def _places(self, start: int, stop: int) -> Tensor:
        """Return the numbers on disk of rows of the dense weight."""
        import torch

        row, half = torch.arange(start, stop), self.head // 2
        inside = row % self.head
        return row - inside + inside % half * 2 + inside // half


def claim(found: Evidence) -> Iterator[CodedTensor]:
    """Yield every tensor of a GGUF checkpoint by its name on the Hub.

    Raises UnsupportedError for types that are not read, and for tensors without a name on the Hub.
    """
    if not (model := found.base.gguf) or any(tensor.coded for tensor in found.tensors.values()):
        return  # no GGUF, or shown dense already
    kinds = {name: tensor.kind for name, tensor in found.tensors.items() if isinstance(tensor, BlockTensor)}
    if odd := sorted({kind for kind in kinds.values() if kind not in KINDS}):
        raise UnsupportedError(
            f"{model.name} has tensors of GGUF's {', '.join(odd)}, which are not read.",
            hint="name the full-precision checkpoint that it was made from",
        )
    names = {name: hub_name(name, model.architecture, found.base.model_types) for name in found.tensors}
    if faults := [Fault(name, "has no name on the Hub that is known") for name, own in names.items() if not own]:
        raise UnsupportedError(f"{model.name} has tensors that are not read.", faults=faults)
    for name, tensor in found.tensors.items():
        yield _dense(found, model, str(names[name]), tensor)


def _dense(found: Evidence, model: GgufModel, name: str, tensor: StoredTensor) -> CodedTensor:
    """Return one dense weight."""
    kind, shape = tensor.dtype, tensor.shape
    if isinstance(tensor, BlockTensor):
        kind, shape = tensor.kind, (*tensor.shape[:-1], tensor.width)
    head = 0
    if (key := next((key for end, key in ROTARY.items() if end in name), "")) and model.architecture == "llama":
        heads = model.number(key) or model.number("attention.head_count")
        head = shape[0] // heads if heads else 0
    added = int(model.architecture in NORMS_PLUS_ONE and name.endswith("norm.weight"))
    if name.endswith("shared_expert_gate.weight"):
        shape = (1, *shape)
    order = ", rows of heads in Meta's order" if head else ""
    scheme = Ggml(f"GGUF {kind}{order}", kind=kind, head=head, added=added)
    return found.dense(name, shape, {"codes": tensor}, scheme)
