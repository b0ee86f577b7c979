"""Give an adapter the base's own names, where its file names modules otherwise: flattened, or by component.

kohya's scripts write `lora_unet_down_blocks_0_attentions_0`: a prefix, and the module's name with underscores for
dots. Such a name cannot be split without a guess. So every module of the base is flattened, and the adapter's name
is looked up.

A pipeline's tensors are named `<component>/<name>`. diffusers' files write `<component>.<name>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from ..adapters import Adapter
from ..storage.checkpoint import Checkpoint

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
CLIP = "text_model."
"""The outer module of CLIP's text model, which transformers 5 leaves out of names."""


def with_base_names(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter whose targets are the base's names, as far as the base has them."""
    names = _dotted if adapter.naming == "components" else _flattened
    table: dict[str, str] = {}
    for flat, module in names(_modules(base)):
        table.setdefault(flat, module)

    def rename(target: str) -> str:
        module, _, leaf = target.rpartition(".")
        return f"{table[module]}.{leaf}" if module in table else target

    changes = (
        replace(change, target=rename(change.target), among=tuple(map(rename, change.among)))
        for change in adapter.changes
    )
    return replace(adapter, changes=tuple(changes))


def _modules(base: Checkpoint) -> Iterable[str]:
    """Return the modules that own a tensor, each once."""
    return dict.fromkeys(name.rpartition(".")[0] for name in base.tensors)


def _spellings(module: str) -> Iterator[str]:
    """Yield a module's names with CLIP's outer module and without it."""
    yield module
    yield module.removeprefix(CLIP) if module.startswith(CLIP) else CLIP + module


def _flattened(modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each module's possible names in kohya's form, and the module."""
    for name in modules:
        component, inside, module = name.rpartition("/")
        prefixes = FLAT_PREFIXES.get(component, (f"lora_{component}_",)) if inside else _every(FLAT_PREFIXES)
        for spelling in _spellings(module):
            flat = spelling.replace(".", "_")
            for prefix in prefixes:
                yield prefix + flat, name
            if not inside:
                yield flat, name


def _dotted(modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each module's possible names in diffusers' form, and the module."""
    for name in modules:
        component, inside, module = name.rpartition("/")
        prefixes = DOTTED_PREFIXES.get(component, (component,)) if inside else _every(DOTTED_PREFIXES)
        for spelling in _spellings(module):
            for prefix in prefixes:
                yield f"{prefix}.{spelling}", name
            if not inside or component in ("unet", "transformer"):
                yield spelling, name


def _every(table: Mapping[str, tuple[str, ...]]) -> dict[str, None]:
    return dict.fromkeys(prefix for prefixes in table.values() for prefix in prefixes)
