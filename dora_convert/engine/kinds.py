"""Load updates of other kinds than low rank, and apply each to any block of the stored weight.

Kinds whose blocks of rows can be computed alone are. A rotation that mixes rows of the stored matrix, and an
addend that only a whole matrix has, is computed whole before the first block; the plan counts its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

from torch import Tensor

from ..adapters import LowRank, Transform
from ..adapters.kinds import Computed, Dense, Factor, Hadamard, Kronecker, Modulated, Sparse, Tucker
from ..adapters.rotations import Rotated
from ..maths import additive, rotations
from ..storage.safetensors import StoredTensor
from .device_buffers import DeviceBuffers


class FactorReader(Protocol):
    """Two factors, of which any rows of the left one can be read."""

    def left(self, start: int, stop: int) -> Tensor:
        """Return rows of the left factor: (stop − start, r)."""

    def right(self, start: int) -> Tensor:
        """Return the right factor, (r, columns)."""


LoadFactors = Callable[[LowRank], FactorReader]


class LoadedTransform(Protocol):
    """A loaded update, for any block of rows of the stored weight."""

    needs_whole: ClassVar[bool]
    """True if `hold` must see the whole stored matrix before the first block."""

    def hold(self, whole: Tensor) -> None:
        """See the whole stored matrix."""

    def hold_back(self, whole: Tensor) -> None:
        """See the whole V, to take the update out of it."""

    def take_back(self, V: Tensor, start: int, stop: int) -> Tensor:
        """Compute W of V in place, for some rows; kinds that add to W have no need of it."""

    def apply_(self, W: Tensor, start: int, stop: int, weight: float) -> Tensor:
        """Compute W + w·(V − W) in place, for some rows."""


class ByRows:
    """A transform whose rows are computed alone."""

    needs_whole: ClassVar[bool] = False

    def hold(self, whole: Tensor) -> None:
        """See nothing: rows are enough."""

    def hold_back(self, whole: Tensor) -> None:
        """See nothing: rows are enough."""

    def take_back(self, V: Tensor, start: int, stop: int) -> Tensor:
        """Raise: an addend is subtracted."""
        raise NotImplementedError


class Addend(ByRows):
    """Adds s·Δ; a kind says the rows of Δ."""

    def __init__(self, scale: float, rows: Callable[[int, int], Tensor]) -> None:
        self._scale, self._rows = scale, rows

    def apply_(self, W: Tensor, start: int, stop: int, weight: float) -> Tensor:
        """Compute W + w·s·Δ in place."""
        return W.add_(self._rows(start, stop), alpha=weight * self._scale)


class Scatter(ByRows):
    """Adds to single elements."""

    def __init__(self, sparse: Sparse, buffers: DeviceBuffers, *, transposed: bool) -> None:
        index = buffers.stored(sparse.index).to(buffers.spec.device).long()
        self._rows, self._columns = index.flip(0) if transposed else index
        self._values = sparse.scale * buffers.whole(sparse.values).flatten()

    def apply_(self, W: Tensor, start: int, stop: int, weight: float) -> Tensor:
        """Compute W + w·s·Δ in place."""
        mine = (self._rows >= start) & (self._rows < stop)
        places = (self._rows[mine] - start, self._columns[mine])
        return W.index_put_(places, weight * self._values[mine], accumulate=True)


class Modulation(ByRows):
    """Multiplies each element by 1 + s·Δ."""

    def __init__(self, scale: float, rows: Callable[[int, int], Tensor]) -> None:
        self._scale, self._rows = scale, rows

    def apply_(self, W: Tensor, start: int, stop: int, weight: float) -> Tensor:
        """Compute W·(1 + w·s·Δ) in place."""
        return W.mul_(1 + weight * self._scale * self._rows(start, stop))

    def take_back(self, V: Tensor, start: int, stop: int) -> Tensor:
        """Return W of V."""
        return V.div_(1 + self._scale * self._rows(start, stop))


class RowRotation(ByRows):
    """Turns each stored row by itself."""

    def __init__(self, rotation: rotations.Rotation) -> None:
        self._rotation = rotation

    def apply_(self, W: Tensor, start: int, stop: int, weight: float) -> Tensor:  # noqa: ARG002 - all rows alike
        """Compute W + w·(WR − W) in place."""
        turned = rotations.turn(W, self._rotation)
        return W.copy_(turned) if weight == 1 else W.lerp_(turned, weight)

    def take_back(self, V: Tensor, start: int, stop: int) -> Tensor:  # noqa: ARG002 - all rows alike
        """Return W of V."""
        return V.copy_(rotations.turn_back(V, self._rotation))


class ColumnRotation:
    """Turns each stored column: all rows are turned at once, before the first block."""

    needs_whole: ClassVar[bool] = True

    def __init__(self, rotation: rotations.Rotation) -> None:
        self._rotation = rotation
        self._held: Tensor | None = None

    def hold(self, whole: Tensor) -> None:
        """Turn a whole stored matrix."""
        self._held = rotations.turn(whole.T, self._rotation).T

    def hold_back(self, whole: Tensor) -> None:
        """Turn a whole stored matrix back."""
        self._held = rotations.turn_back(whole.T, self._rotation).T

    def apply_(self, W: Tensor, start: int, stop: int, weight: float) -> Tensor:
        """Compute W + w·(RW − W) in place."""
        assert self._held is not None
        turned = self._held[start:stop]
        return W.copy_(turned) if weight == 1 else W.lerp_(turned, weight)

    def take_back(self, V: Tensor, start: int, stop: int) -> Tensor:
        """Return W of V; `hold_back` has seen the whole matrix."""
        assert self._held is not None
        return V.copy_(self._held[start:stop])


def load_transform(
    transform: Transform, buffers: DeviceBuffers, load: LoadFactors, *, transposed: bool
) -> LoadedTransform:
    """Read the tensors of an update that is not low rank, for a weight stored as (out, in) or turned.

    `load` reads two factors for the same weight.
    """
    match transform:
        case Modulated(by):
            return Modulation(1.0, _product(by, buffers, load, transposed=transposed))
        case Rotated():
            rotation = load_rotation(transform, buffers)
            return (ColumnRotation if mixes_rows(transform, transposed=transposed) else RowRotation)(rotation)
        case Hadamard(one, other):
            first, second = (_product(each, buffers, load, transposed=transposed) for each in (one, other))
            return Addend(transform.scale, lambda start, stop: first(start, stop).mul_(second(start, stop)))
        case Kronecker(one, other):
            left, right = (_turned(_whole(each, buffers), turned=transposed) for each in (one, other))
            return Addend(transform.scale, lambda start, stop: additive.kronecker_rows(left, right, start, stop))
        case Dense(value) if not transposed:
            return Addend(transform.scale, lambda start, stop: buffers.rows(value, start, stop))
        case Sparse():
            return Scatter(transform, buffers, transposed=transposed)
    whole = _turned(_whole(transform, buffers), turned=transposed)
    return Addend(transform.scale, lambda start, stop: whole[start:stop])


def mixes_rows(transform: Rotated, *, transposed: bool) -> bool:
    """Return True if a rotation mixes rows of the stored matrix."""
    return transform.on_outputs != transposed


def load_rotation(rotated: Rotated, buffers: DeviceBuffers) -> rotations.Rotation:
    """Read a rotation."""
    stored = rotated.blocks
    blocks = buffers.whole(stored).view(stored.shape)
    match rotated.rule:
        case "oft":
            return rotations.oft(blocks, rotated.size, rotated.terms, rotated.limit, embedding=rotated.embedding)
        case "boft":
            return rotations.boft(blocks)
        case "hra":
            return rotations.hra(blocks, orthogonal=bool(rotated.terms))
        case "diag-oft":
            return rotations.diag_oft(blocks, rotated.limit)
    return rotations.butterfly(blocks, rotated.limit)


def _product(
    part: LowRank | Tucker, buffers: DeviceBuffers, load: LoadFactors, *, transposed: bool
) -> Callable[[int, int], Tensor]:
    """Return the function that computes rows of s·BA, or of a product with a core."""
    if isinstance(part, Tucker):
        whole = part.scale * _turned(_whole(part, buffers), turned=transposed)
        return lambda start, stop: whole[start:stop].clone()
    factors = load(part)
    return lambda start, stop: part.scale * factors.left(start, stop) @ factors.right(start)


def _turned(matrix: Tensor, *, turned: bool) -> Tensor:
    return matrix.T if turned else matrix


def _whole(part: Factor | Transform, buffers: DeviceBuffers) -> Tensor:
    """Compute a whole matrix, (out, in): a stored one, a product, or Δ by its rule."""
    match part:
        case StoredTensor():
            return buffers.whole(part)
        case LowRank(A, B):
            return part.scale * (buffers.whole(B) @ buffers.whole(A))
        case Tucker(core, A, B):
            flat = buffers.whole(core).view(*core.shape[:2], -1)
            return additive.tucker(flat, buffers.whole(B), buffers.whole(A))
        case Dense(value):
            return buffers.whole(value)
        case Computed():
            return _computed(part, buffers)
    raise AssertionError(part)


def _computed(part: Computed, buffers: DeviceBuffers) -> Tensor:
    """Compute Δ (out, in) by its rule."""
    tensors = {role: buffers.whole(stored).view(stored.shape) for role, stored in part.parts}
    numbers, (outputs, inputs) = dict(part.numbers), part.shape
    assert outputs
    assert inputs
    match part.rule:
        case "MiSS":
            return additive.tiled(tensors["block"], (outputs, inputs))
        case "DeLoRA":
            norms, strength = tensors["norms"].flatten(), tensors["strength"].flatten()
            return additive.bounded(tensors["A"], tensors["B"], strength, norms)
        case "FourierFT":
            return additive.fourier(tensors["spectrum"].flatten(), int(numbers["seed"]), (outputs, inputs))
        case "C3A":
            return additive.circulant(tensors["kernel"])
        case "RandLoRA":
            bases = tensors["A"], tensors["B"]
            return additive.random_bases(*bases, tensors["weights"], tensors["scales"], (outputs, inputs))
        case "VeRA with matrices":
            return (tensors["E"] @ (tensors["B"] @ tensors["D"])) @ tensors["A"]
    assert part.rule == "VeRA"
    widest = int(numbers["outputs"]), int(numbers["inputs"])
    A, B = additive.seeded_projections(int(numbers["seed"]), int(numbers["rank"]), widest)
    A, B = A[:, :inputs].to(tensors["d"]), B[:outputs].to(tensors["d"])
    return (tensors["b"].view(-1, 1) * B) @ (tensors["d"].view(-1, 1) * A)
