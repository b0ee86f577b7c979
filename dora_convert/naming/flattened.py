"""Give an adapter the base's own names, where its file names modules otherwise: flattened, or by component.

kohya's scripts write `lora_unet_down_blocks_0_attentions_0`: a prefix, and the module's name with underscores for
dots. Such a name cannot be split without a guess. So every module of the base is flattened, and the adapter's name
is looked up.

A pipeline's tensors are named `<component>/<name>`. diffusers' files write `<component>.<name>`. A single file with
a whole pipeline has other beginnings for its components. Its U-Net and its text models, or Flux, may have the names of
their authors, and the adapter those of diffusers, or the other way round (`layouts.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ..adapters import Adapter, tensors_of
from ..errors import Fault
from ..storage.checkpoint import Checkpoint
from .diffusion import DiffusionNames

Spell = Callable[[str, str, Collection[str]], Iterable[str]]
"""Gives the names of a module, by its component, its name inside of it, and all components."""

FLAT_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("lora_unet_", "lycoris_unet_", "lycoris_"),
    "transformer": ("lora_transformer_", "lora_unet_", "lycoris_transformer_", "lycoris_"),
    "prior": ("lora_prior_unet_", "lora_prior_"),
    "text_encoder": ("lora_te_", "lora_te1_", "lora_text_encoder_"),
    "text_encoder_2": ("lora_te2_", "lora_text_encoder_2_"),
    "text_encoder_3": ("lora_te3_", "lora_text_encoder_3_"),
}
"""The prefixes that kohya, LyCORIS and OneTrainer give the modules of a component."""
DOTTED_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("unet", "diffusion_model", "unet.base_model.model"),
    "transformer": ("transformer", "diffusion_model", "transformer.base_model.model"),
    "text_encoder": ("text_encoder", "text_encoders.clip_l", "te1"),
    "text_encoder_2": ("text_encoder_2", "text_encoders.clip_g", "te2"),
    "text_encoder_3": ("text_encoder_3", "text_encoders.t5xxl", "te3"),
}
"""The first words that diffusers, ComfyUI and ai-toolkit give a component."""
AVERAGED = "model_ema."
"""The beginning of an averaged copy of a single file's U-Net."""
CLIP = "text_model."
"""The outer module of CLIP's text model, which transformers 5 leaves out of names."""


def with_base_names(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter whose targets are the base's names, as far as the base has them.

    A name in the other layout of a diffusion model becomes `<component>/<that name>`, which leads to slots. A name
    that could be several modules of the base is a fault.
    """
    table = _NameTable(base, _dotted if adapter.naming == "components" else _flattened)
    changes, faults = [], list[Fault]()
    for change in adapter.changes:
        found = table.find(change.module)
        if len(found) > 1:
            faults += [
                Fault(tensor.name, f"may be for any of {', '.join(found)}") for tensor in tensors_of(change.update)
            ]
            continue
        changes.append(
            replace(change, target=table.rename(change.target), among=tuple(map(table.rename, change.among)))
        )
    averaged = any(name.startswith(AVERAGED) for name in base.tensors)
    warnings = (f"{base.source.name} has averaged weights ({AVERAGED}…), which stay as they are",) if averaged else ()
    faults = [*adapter.faults, *faults]
    return replace(adapter, changes=tuple(changes), faults=tuple(faults), warnings=(*adapter.warnings, *warnings))


class _NameTable:
    """The modules of a base by the names that they have in files of one kind."""

    def __init__(self, base: Checkpoint, names: Spell) -> None:
        """Enter the base's own names first, then CLIP's other spelling, then names in another layout."""
        self._tables: tuple[dict[str, dict[str, None]], ...] = ({}, {}, {})
        diffusion = DiffusionNames(base.tensors)
        components = diffusion.components
        for component, module, target in diffusion.own():
            self._enter(0, names(component, module, components), target)
            self._enter(0, names("", target, components) if component and "/" not in target else (), target)
            self._enter(1, names(component, _respelled(module), components), target)
        for component, module, target in diffusion.others():
            for spelling in (module, _respelled(module)):
                self._enter(2, names(component, spelling, components), target)

    def _enter(self, rank: int, names: Iterable[str], target: str) -> None:
        for name in names:
            self._tables[rank].setdefault(name, {})[target] = None

    def find(self, module: str) -> tuple[str, ...]:
        """Return the modules of the base that a name may be for."""
        return next((tuple(table[module]) for table in self._tables if module in table), ())

    def rename(self, target: str) -> str:
        """Return a target with the base's name of its module."""
        module, _, leaf = target.rpartition(".")
        found = self.find(module)
        return f"{found[0]}.{leaf}" if found else target


def _respelled(module: str) -> str:
    """Return a module's name without CLIP's outer module, or with it."""
    return module.removeprefix(CLIP) if module.startswith(CLIP) else CLIP + module


def _flattened(component: str, module: str, components: Collection[str]) -> Iterator[str]:
    """Yield a module's possible names in kohya's form."""
    prefixes = _prefixes(FLAT_PREFIXES, component, components) or (f"lora_{component}_",)
    flat = module.replace(".", "_")
    yield from (prefix + flat for prefix in prefixes)
    if not component:
        yield flat


def _dotted(component: str, module: str, components: Collection[str]) -> Iterator[str]:
    """Yield a module's possible names in diffusers' form."""
    yield from (f"{prefix}.{module}" for prefix in _prefixes(DOTTED_PREFIXES, component, components) or (component,))
    if component in ("", "unet", "transformer"):
        yield module


def _prefixes(table: Mapping[str, tuple[str, ...]], component: str, components: Collection[str]) -> Sequence[str]:
    """Return the prefixes of a component's modules; those of all components for a model without components."""
    if not component:
        return tuple(dict.fromkeys(prefix for prefixes in table.values() for prefix in prefixes))
    third = table["text_encoder_3"] if component == "text_encoder_2" and "text_encoder_3" not in components else ()
    return (*table.get(component, ()), *third)
