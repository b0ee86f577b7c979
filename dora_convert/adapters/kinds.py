"""Hold the kinds of update that are rarer than LoRA and DoRA: their tensors, and the equation of each.

`W` is (out, in); a convolution's is (out, in, k…), and rows of it are flattened. Equations have the numbers of
docs/mathematics.md. Every tensor may be a view of another one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..storage.safetensors import StoredTensor
from . import Decomposed, LowRank, Transform, Update


@dataclass(frozen=True)
class Tucker(Transform):
    """W' = W + s·Δ with Δ[o, i, …] = Σ core[m, n, …]·B[o, m]·A[n, i]: LoCon with `lora_mid`, LoHa and LoKr with t."""

    core: StoredTensor  # (r of B, r of A, k…)
    A: StoredTensor  # (r, in)
    B: StoredTensor  # (out, r)
    scale: float = 1.0
    transposed: bool | None = False

    @property
    def rank(self) -> int:
        """The rank of B."""
        return self.core.shape[0]

    @property
    def outputs(self) -> int:
        """The rows of B."""
        return self.B.shape[0]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The columns of A, and the kernel."""
        return (self.A.shape[1], *self.core.shape[2:])

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The core and both factors."""
        return (self.core, self.A, self.B)

    @property
    def title(self) -> str:
        """The kind and its numbers."""
        return f"LoCon with a core, rank {self.rank}, scaling {self.scale:g}"


@dataclass(frozen=True)
class Hadamard(Transform):
    """W' = W + s·(B₁A₁ ∘ B₂A₂) (LoHa: FedPara, arXiv:2108.06098); scalings of the two factors count, too."""

    one: LowRank | Tucker
    other: LowRank | Tucker
    scale: float
    transposed: bool | None = None

    @property
    def rank(self) -> int:
        """The rank of each factor."""
        return self.one.rank

    @property
    def outputs(self) -> int:
        """The rows of both products."""
        return self.one.outputs

    @property
    def inputs(self) -> tuple[int, ...]:
        """The shape of a row of both products."""
        return self.one.inputs

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The factors of both products."""
        return (*self.one.tensors, *self.other.tensors)

    @property
    def title(self) -> str:
        """The kind and its numbers."""
        return f"LoHa, rank {self.rank}, scaling {self.scale:g}"


Factor = StoredTensor | LowRank | Tucker


@dataclass(frozen=True)
class Kronecker(Transform):
    """W' = W + s·(C₁ ⊗ C₂) (LoKr, arXiv:2309.14859); each C is stored whole or as factors.

    C₁ is a matrix; C₂ may have the kernel of a convolution behind its two dimensions.
    """

    one: StoredTensor | LowRank
    other: Factor
    scale: float
    transposed: bool | None = None

    @property
    def outputs(self) -> int:
        """The product of the rows."""
        return shape_of(self.one)[0] * shape_of(self.other)[0]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The product of the columns, and the kernel."""
        (_, many), (_, columns, *kernel) = shape_of(self.one), shape_of(self.other)
        return (many * columns, *kernel)

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The tensors of both factors."""
        return (*parts_of(self.one), *parts_of(self.other))

    @property
    def title(self) -> str:
        """The kind and its numbers."""
        blocks = "×".join(map(str, shape_of(self.one)))
        return f"LoKr, {blocks} blocks, scaling {self.scale:g}"


def parts_of(factor: Factor) -> tuple[StoredTensor, ...]:
    """Return the tensors of a Kronecker factor."""
    return (factor,) if isinstance(factor, StoredTensor) else factor.tensors


def shape_of(factor: Factor) -> tuple[int, ...]:
    """Return the shape of a Kronecker factor as a whole."""
    return factor.shape if isinstance(factor, StoredTensor) else (factor.outputs, *factor.inputs)


@dataclass(frozen=True)
class Dense(Transform):
    """W' = W + s·Δ with Δ stored whole, in W's shape (LyCORIS' `diff`)."""

    value: StoredTensor
    scale: float = 1.0
    transposed: bool | None = False

    @property
    def outputs(self) -> int:
        """The rows of Δ."""
        return self.value.shape[0]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The shape of a row of Δ."""
        return self.value.shape[1:]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Δ alone."""
        return (self.value,)

    @property
    def title(self) -> str:
        """The kind and its scaling."""
        return f"a difference saved whole, scaling {self.scale:g}"


@dataclass(frozen=True)
class Sparse(Transform):
    """W' = W + s·Δ with Δ[index[0, k], index[1, k]] += values[k] (SHiRA, arXiv:2406.13175)."""

    values: StoredTensor  # n elements
    index: StoredTensor  # (2, n): rows and columns of W as (out, in)
    scale: float = 1.0

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The values and their places."""
        return (self.values, self.index)

    @property
    def title(self) -> str:
        """The kind and its numbers."""
        return f"{self.values.numel} single elements, scaling {self.scale:g}"


@dataclass(frozen=True)
class Modulated(Transform):
    """W' = W ∘ (1 + s·BA) (HiRA, ICLR 2025)."""

    by: LowRank
    depends: ClassVar[bool] = True

    @property
    def outputs(self) -> int:
        """The rows of BA."""
        return self.by.outputs

    @property
    def inputs(self) -> tuple[int, ...]:
        """The shape of a row of BA."""
        return self.by.inputs

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Both factors."""
        return self.by.tensors

    @property
    def title(self) -> str:
        """The kind and its numbers."""
        return f"HiRA, rank {self.by.rank}, scaling {self.by.scale:g}"


@dataclass(frozen=True)
class Computed(Transform):
    """W' = W + s·Δ with Δ computed whole by a rule: FourierFT, C3A, RandLoRA, DeLoRA, MiSS and VeRA from a seed."""

    rule: str
    parts: tuple[tuple[str, StoredTensor], ...]
    """The rule's tensors by their roles."""
    scale: float = 1.0
    numbers: tuple[tuple[str, float], ...] = ()
    """The rule's other numbers, such as a seed."""
    shape: tuple[int | None, int | None] = (None, None)
    """The outputs and inputs of Δ, as far as the parts tell."""
    widest: bool = False
    """True if the rule needs the outputs and inputs of the widest weights that the adapter changes."""

    def shaped(self, outputs: int, inputs: int) -> Computed:
        """Return the same for a weight of a shape."""
        return replace(self, shape=(outputs, inputs))

    @property
    def outputs(self) -> int | None:
        """The rows of Δ, if the parts tell."""
        return self.shape[0]

    @property
    def inputs(self) -> tuple[int, ...] | None:
        """The columns of Δ, if the parts tell."""
        return None if self.shape[1] is None else (self.shape[1],)

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The rule's tensors."""
        return tuple(tensor for _, tensor in self.parts)

    @property
    def title(self) -> str:
        """The rule and the scaling."""
        return f"{self.rule}, scaling {self.scale:g}"


@dataclass(frozen=True)
class Follows(Update):
    """b' = b·m/‖V‖: a bias that is scaled as the outputs of its module's weight are."""

    weight: str
    """The weight, by the name that its own change targets."""
    follows: ClassVar[bool] = True

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """None: the weight's change has m."""
        return ()

    @property
    def title(self) -> str:
        """The weight."""
        return f"a bias, scaled as {self.weight} is"


@dataclass(frozen=True)
class Undecided(Update):
    """Updates of which one is meant, and no file says which: the base's norms decide."""

    choices: tuple[Decomposed, ...]
    question: str
    """Asks for the choice, such as "by rows or by columns?"."""
    option: str = "--axis"
    """The option that answers the question."""

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The tensors of the first choice; all choices have the same."""
        return self.choices[0].tensors

    @property
    def title(self) -> str:
        """The first choice, and the question."""
        return f"{self.choices[0].title}; {self.question}"
