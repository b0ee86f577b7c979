"""Find the components of a diffusion model, and the slots of weights that the other layout names.

A pipeline in folders has tensors `<component>/<name>`. A single file has one beginning for each component:

    model.diffusion_model.                  unet, or transformer
    cond_stage_model.transformer.  .model.  text_encoder: CLIP's in Hugging Face's names, OpenCLIP's
    conditioner.embedders.0.transformer.    text_encoder of SDXL
    conditioner.embedders.1.model.          text_encoder_2 of SDXL; embedders.0.model. in its refiner
    text_encoders.clip_l.transformer.  …    text_encoder, text_encoder_2, text_encoder_3, as ComfyUI saves them

A weight's name in the other layout is written as in a pipeline: `unet/down_blocks.0.resnets.0.conv1.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from ..storage.safetensors import StoredTensor
from .layouts import flux_pairs, layout_of, other_names, unet_pairs
from .slots import Slot

PREFIXES = (
    ("model.diffusion_model.", "unet"),
    ("cond_stage_model.transformer.", "text_encoder"),
    ("cond_stage_model.model.", "text_encoder"),
    ("conditioner.embedders.0.transformer.", "text_encoder"),
    ("conditioner.embedders.0.model.", "text_encoder_2"),
    ("conditioner.embedders.1.model.", "text_encoder_2"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3"),
)
"""The beginnings of names in a single file, and their components."""


DIFFUSERS = ("down_blocks.", "single_transformer_blocks.")
"""Beginnings of names that only diffusers has."""


class ComponentModule(NamedTuple):
    """A module of a diffusion model, or of any other."""

    component: str
    """Such as unet; empty for other models."""
    module: str
    """The module's name inside of the component."""
    target: str
    """The module's name among the base's tensors; in the other layout, `<component>/<module>`."""


class DiffusionNames:
    """The components of a checkpoint, and the names of their weights in the other layout. A `NameMap`.

    A checkpoint that is no diffusion model has one component without a name, and no other names.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    @cached_property
    def _parts(self) -> dict[str, dict[str, str]]:
        """For each component, the names of its tensors inside of it, and on disk."""
        found: dict[str, dict[str, str]] = {}
        whole = _whole_model(self._tensors)
        for name in self._tensors:
            folder, inside, _ = name.partition("/")
            component, start = (folder, len(folder) + 1) if inside else _beginning(name) or (whole, 0)
            found.setdefault(component, {})[name[start:]] = name
        if "unet" in found and _is_transformer(found["unet"]):
            found["transformer"] = found.pop("unet")
        if "text_encoder_3" in found and "text_encoder_2" not in found:  # Flux
            found["text_encoder_2"] = found.pop("text_encoder_3")
        return found

    @property
    def components(self) -> tuple[str, ...]:
        """The names of all components."""
        return tuple(self._parts)

    @property
    def is_single_file(self) -> bool:
        """True if components are not folders, and one of them at least is known."""
        return any(self._parts) and not any("/" in name for names in self._parts.values() for name in names.values())

    @property
    def is_bare(self) -> bool:
        """True if the only component is one model, whose names have no beginning for it."""
        return len(self._parts) == 1 and all(
            inner == own for part in self._parts.values() for inner, own in part.items()
        )

    @cached_property
    def own_names(self) -> Mapping[str, str]:
        """For each tensor, `<component>/<its name inside of it>`."""
        return {
            own: f"{part}/{inner}" if part else own
            for part, names in self._parts.items()
            for inner, own in names.items()
        }

    @cached_property
    def diffusers_names(self) -> Mapping[str, str]:
        """For each tensor, `<component>/<diffusers' name>`; tensors that lie otherwise there are left out."""
        other = {slot.name: name for name, slots in self.weights.items() for slot in slots if slot.is_whole}
        has_part = {slot.name for slots in self.weights.values() for slot in slots if not slot.is_whole}
        if any(name.startswith(DIFFUSERS) for names in self._parts.values() for name in names):
            return self.own_names
        return {own: other.get(own, name) for own, name in self.own_names.items() if own not in has_part}

    @cached_property
    def weights(self) -> Mapping[str, tuple[Slot, ...]]:
        """The weights that only the other layout names, and their slots."""
        found: dict[str, tuple[Slot, ...]] = {}
        for component, names in self._parts.items():
            inner = {name: self._tensors[own] for name, own in names.items()}
            for other, slots in other_names(inner):
                found[f"{component}/{other}"] = tuple(replace(slot, name=names[slot.name]) for slot in slots)
        return found

    def own(self) -> Iterator[ComponentModule]:
        """Yield every module that owns a tensor, under its own name, each once."""
        seen: dict[str, ComponentModule] = {}
        for component, names in self._parts.items():
            for inner, own in names.items():
                target = own.rpartition(".")[0]
                seen.setdefault(target, ComponentModule(component, inner.rpartition(".")[0], target))
        yield from seen.values()

    def others(self) -> Iterator[ComponentModule]:
        """Yield every module that only the other layout names, each once."""
        for target in dict.fromkeys(name.rpartition(".")[0] for name in self.weights):
            component, _, module = target.partition("/")
            yield ComponentModule(component, module, target)

    def stored(self, target: str) -> tuple[Slot, ...] | None:
        """Return the slots of a weight that the other layout names; None for all other names."""
        return self.weights.get(target)

    def running(self, name: str) -> str | None:
        """Return the first weight of the other layout that a stored tensor is part of."""
        return next((weight for weight, slots in self.weights.items() if any(s.name == name for s in slots)), None)


def _beginning(name: str) -> tuple[str, int] | None:
    """Return the component of a tensor of a single file, and the length of the component's beginning."""
    return next(((component, len(start)) for start, component in PREFIXES if name.startswith(start)), None)


def _whole_model(tensors: Mapping[str, StoredTensor]) -> str:
    """Return the component that a file or a folder of one model is; empty if it is no diffusion model."""
    layout = layout_of(tensors)
    return "unet" if layout is unet_pairs else "transformer" if layout is flux_pairs else ""


def _is_transformer(names: Mapping[str, str]) -> bool:
    """Return True for a model that has no blocks of a U-Net."""
    return not any(name.startswith(("input_blocks.", "down_blocks.")) for name in names)
