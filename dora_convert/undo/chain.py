"""Take a chain of edits out again, the last link first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from ..engine.device_buffers import DeviceBuffers
from ..plan.item import Item
from .inverse import Inverse


class ChainInverse(Inverse):
    """The inverse of each link, (7) for one edit, in the order from the last link to the first."""

    def __init__(self, item: Item, buffers: DeviceBuffers, *, exact: bool, taken: tuple[Tensor, Tensor] | None) -> None:
        assert taken is None  # an adapter that changed the base before training is merged alone
        links = [replace(item, edits=(edit,), combination=None) for edit in item.edits]
        self._links = [Inverse(link, buffers, exact=exact, taken=None) for link in links]
        self.operands = [link.operands[0] for link in self._links]
        self.keeps = any(link.keeps for link in self._links)

    def hold(self, read: Callable[[int, int], Tensor], norms: Callable[[int, int], Sequence[Tensor | None]]) -> None:
        """Do nothing: no link of a chain that is inverted needs all rows at once."""

    def predict_(self, x: Tensor, start: int, stop: int, norms: Sequence[Tensor | None]) -> Tensor:
        """Compute W from W' in place."""
        if self.keeps:
            return x
        for link, n in zip(reversed(self._links), reversed(norms), strict=True):
            x = link.predict_(x, start, stop, [n])
        return x

    def coefficients(
        self, norms: Sequence[Tensor | None], start: int, stop: int
    ) -> tuple[Tensor | None, list[Tensor | float]]:
        """Return the product of all links' g, None if it is 1, and c of each link."""
        pairs = [link.coefficients([n], start, stop) for link, n in zip(self._links, norms, strict=True)]
        g: Tensor | None = None
        for factor, _ in pairs:
            g = factor if g is None else g if factor is None else g * factor
        return g, [c[0] for _, c in pairs]


def inverse_of(
    item: Item, buffers: DeviceBuffers, *, exact: bool, taken: tuple[Tensor, Tensor] | None = None
) -> Inverse:
    """Return the inverse of an item's edits; that of none for a combination that has no inverse."""
    if item.combination and item.invertible:
        return ChainInverse(item, buffers, exact=exact, taken=taken)
    return Inverse(item if item.invertible else replace(item, edits=()), buffers, exact=exact, taken=taken)
