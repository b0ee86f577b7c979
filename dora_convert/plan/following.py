"""Match a bias with the edit that scales the outputs of its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..adapters import Update
from ..adapters.kinds import Follows
from ..naming.resolve import NameResolver
from .item import Edit, Item
from .shapes import TargetTensor


def followed(
    update: Update,
    bias: str | None,
    names: NameResolver,
    targets: Mapping[str, TargetTensor],
    item: Callable[[str], Item],
) -> Edit | str | None:
    """Return the edit of a bias, the reason that there is none, or None for a module without a bias.

    The weight's own edit is the last one that sets magnitudes: changes of a module come together.
    """
    assert isinstance(update, Follows)
    weight = names.find(update.weight)
    if not bias or not weight:
        parted = names.slots(update.weight.removesuffix("weight") + "bias")
        return "is a part of a bias, or several biases, that its weight scales: not done yet" if parted else None
    edit = next((edit for edit in reversed(targets[weight].edits) if edit.magnitudes), None)
    if not edit or not edit.magnitudes:
        return None
    count = edit.magnitudes.m.numel
    if edit.outputs is None and targets[bias].source.numel != count:
        return f"{bias} has {targets[bias].source.numel} elements for {count} magnitudes"
    whole = replace(item(weight), edits=(replace(edit, weight=1.0),))
    return Edit(update, outputs=edit.outputs, follows=whole)
