"""Name the modules of a new adapter by component, where the base is a single file of a diffusion model.

A single file has names such as `model.diffusion_model.input_blocks.1.1.proj_in`. kohya's files keep the authors' names
after the component's prefix. diffusers' files have diffusers' names.
"""

from __future__ import annotations

from dataclasses import replace

from ..adapters.new_adapter import NewAdapter
from ..errors import Fault, UnsupportedError
from .diffusion import DiffusionNames
from .views import with_names

KEEPS = ("kohya",)
"""Formats that have the authors' names, too."""
WITH_COMPONENTS = ("kohya", "diffusers")
"""Formats that name a component even if the base is nothing else."""


def by_component(new: NewAdapter, format_name: str) -> NewAdapter:
    """Return a new adapter whose targets are `<component>/<name>`; of other models the adapter itself.

    Raises UnsupportedError for tensors that lie otherwise in diffusers, in a format of diffusers' names.
    """
    if new.model is None or not (names := DiffusionNames(new.model.tensors)).is_single_file:
        return new
    if names.is_bare and format_name not in WITH_COMPONENTS:
        return new
    shown = names.own_names if format_name in KEEPS else names.diffusers_names
    if fused := [each.target for each in new.changes if each.target in new.model.tensors and each.target not in shown]:
        raise UnsupportedError(
            f"{format_name} cannot hold {len(fused)} changes.",
            faults=[
                Fault(name, "lies otherwise in diffusers: in several weights, or in another order") for name in fused
            ],
            hint="--to kohya, or --format kohya, keeps the tensors as they are",
        )
    changes = tuple(replace(change, target=shown.get(change.target, change.target)) for change in new.changes)
    model = with_names(new.model, lambda name: [shown.get(name, name)])
    return replace(new, changes=changes, model=model, like=None)
