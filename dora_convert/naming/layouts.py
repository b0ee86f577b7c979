"""Pair the names that diffusion models have in diffusers with those of the models' own authors.

    U-Net of SD 1, 2, SDXL   down_blocks.1.attentions.0.norm          input_blocks.4.1.norm
    OpenCLIP's text model    text_model.encoder.layers.0.mlp.fc1      transformer.resblocks.0.mlp.c_fc
    Flux                     transformer_blocks.0.attn.to_q, …        double_blocks.0.img_attn.qkv

The blocks of a U-Net are counted by the modules that the base has, in either layout. Nothing of diffusers is needed;
`tests/oracles/diffusion.py` compares with diffusers' own conversions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import count
from typing import NamedTuple

from ..storage.safetensors import StoredTensor
from .slots import Slot

Tensors = Mapping[str, StoredTensor]
LEAVES = ("weight", "bias")


class ModulePair(NamedTuple):
    """A module in both layouts; `{}` stands for weight or bias."""

    authors: str
    """The authors' name of the module's tensors."""
    diffusers: tuple[str, ...]
    """diffusers' names: several, if the authors' tensor has these one below the other."""
    swapped: bool = False
    """True if the halves of the outputs have changed places."""
    turned: bool = False
    """True if the authors' tensor is stored as (in, out)."""


OUTER = {
    "time_embed.0": ("time_embedding.linear_1",), "time_embed.2": ("time_embedding.linear_2",),
    "label_emb.0.0": ("add_embedding.linear_1", "class_embedding.linear_1"),
    "label_emb.0.2": ("add_embedding.linear_2", "class_embedding.linear_2"),
    "input_blocks.0.0": ("conv_in",), "out.0": ("conv_norm_out",), "out.2": ("conv_out",),
}  # fmt: skip
"""Modules of a U-Net outside of its blocks; where there are two names, a model has one of the two."""
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "out_layers.0": "norm2", "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj", "skip_connection": "conv_shortcut",
}  # fmt: skip
"""Modules of a residual block."""
OPEN_CLIP = {
    "ln_1": ("layer_norm1",), "ln_2": ("layer_norm2",), "mlp.c_fc": ("mlp.fc1",), "mlp.c_proj": ("mlp.fc2",),
    "attn.out_proj": ("self_attn.out_proj",),
    "attn.in_proj_{}": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}  # fmt: skip
"""Modules of a layer of OpenCLIP's text model."""
FLUX_OUTER = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder", "img_in": "x_embedder", "final_layer.linear": "proj_out",
}  # fmt: skip
"""Modules of Flux outside of its blocks."""
FLUX_DOUBLE = {
    "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm.scale": ("attn.norm_q",), "img_attn.norm.key_norm.scale": ("attn.norm_k",),
    "txt_attn.norm.query_norm.scale": ("attn.norm_added_q",), "txt_attn.norm.key_norm.scale": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",), "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
}  # fmt: skip
"""Modules of a block of Flux for image and text."""
FLUX_SINGLE = {
    "modulation.lin": ("norm.linear",), "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",), "norm.query_norm.scale": ("attn.norm_q",), "norm.key_norm.scale": ("attn.norm_k",),
}  # fmt: skip
"""Modules of a block of Flux for both at once."""


def other_names(tensors: Tensors) -> Iterator[tuple[str, tuple[Slot, ...]]]:
    """Yield each name that a component's weights have in the other layout, and the slots of the weight.

    `tensors` are the component's, by names inside of it. Weights that have one name in both layouts are left out.
    """
    layout = layout_of(tensors)
    for pair in layout(tensors) if layout else ():
        for leaf in LEAVES if "{}" in pair.authors else LEAVES[:1]:
            authors, own = pair.authors.format(leaf), [name.format(leaf) for name in pair.diffusers]
            if authors in tensors:
                yield from zip(own, _parts(pair, authors, tensors), strict=True)
            elif all(name in tensors for name in own):
                yield authors, _stacked(pair, own, tensors)


def layout_of(tensors: Collection[str]) -> Callable[[Tensors], Iterator[ModulePair]] | None:
    """Return the pairs of a component's kind of model; None for models that have one layout, or are not known."""
    if "down_blocks.0.resnets.0.conv1.weight" in tensors or "input_blocks.1.0.in_layers.2.weight" in tensors:
        return unet_pairs
    if "transformer.resblocks.0.attn.in_proj_weight" in tensors:
        return open_clip_pairs
    if {"double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.0.proj_mlp.weight"} & set(tensors):
        return flux_pairs
    return None


def _parts(pair: ModulePair, authors: str, tensors: Tensors) -> Iterator[tuple[Slot, ...]]:
    """Yield the slot of each of diffusers' weights in the authors' tensor."""
    rows, first = tensors[authors].shape[0], 0
    if len(pair.diffusers) == 1:
        yield (Slot(authors, order=_halves(rows) if pair.swapped else None, transposed=pair.turned or None),)
        return
    for size in _sizes(pair, authors, tensors):
        yield (Slot(authors, part=(first, first + size)),)
        first += size


def _sizes(pair: ModulePair, authors: str, tensors: Tensors) -> list[int]:
    """Return the outputs of each part: thirds; of Flux's linear1 the width of the model three times, and the rest."""
    rows = tensors[authors].shape[0]
    if len(pair.diffusers) == 3:
        return [rows // 3] * 3
    width = tensors[pair.authors.format("weight")].shape[-1]
    return [width, width, width, rows - 3 * width]


def _stacked(pair: ModulePair, own: list[str], tensors: Tensors) -> tuple[Slot, ...]:
    """Return the slots that diffusers' weights are in the authors' tensor."""
    if len(own) == 1:
        order = _halves(tensors[own[0]].shape[0]) if pair.swapped else None
        return (Slot(own[0], order=order, transposed=pair.turned or None),)
    slots, first = list[Slot](), 0
    for name in own:
        last = first + tensors[name].shape[0]
        slots.append(Slot(name, outputs=(first, last)))
        first = last
    return tuple(slots)


def _halves(rows: int) -> tuple[int, ...]:
    return (*range(rows // 2, rows), *range(rows // 2))


def _pairs(before: str, after: str, table: Mapping[str, tuple[str, ...]]) -> Iterator[ModulePair]:
    """Yield a table's modules inside of a block."""
    for authors, names in table.items():
        has_leaf = authors.endswith((".scale", "_{}"))
        yield ModulePair(before + authors + ("" if has_leaf else ".{}"), tuple(f"{after}{name}.{{}}" for name in names))


def _numbers(tensors: Collection[str], stack: str) -> list[int]:
    """Return the numbers of a stack's blocks."""
    pattern = re.compile(rf"{re.escape(stack)}\.(\d+)\.")
    return sorted({int(match[1]) for name in tensors if (match := pattern.match(name))})


def open_clip_pairs(tensors: Tensors) -> Iterator[ModulePair]:
    """Yield the modules of OpenCLIP's text model that have different names in Hugging Face's CLIP."""
    for n in _numbers(tensors, "transformer.resblocks"):
        yield from _pairs(f"transformer.resblocks.{n}.", f"text_model.encoder.layers.{n}.", OPEN_CLIP)
    yield ModulePair("token_embedding.{}", ("text_model.embeddings.token_embedding.{}",))
    yield ModulePair("positional_embedding", ("text_model.embeddings.position_embedding.weight",))
    yield ModulePair("ln_final.{}", ("text_model.final_layer_norm.{}",))
    yield ModulePair("text_projection", ("text_projection.weight",), turned=True)


def flux_pairs(tensors: Tensors) -> Iterator[ModulePair]:
    """Yield the modules of Flux."""
    for stacks, table in (("double_blocks", "transformer_blocks"), FLUX_DOUBLE), (
        ("single_blocks", "single_transformer_blocks"), FLUX_SINGLE,
    ):  # fmt: skip
        for n in sorted({n for stack in stacks for n in _numbers(tensors, stack)}):
            yield from _pairs(f"{stacks[0]}.{n}.", f"{stacks[1]}.{n}.", table)
    yield from _pairs("", "", {authors: (name,) for authors, name in FLUX_OUTER.items()})
    yield ModulePair("final_layer.adaLN_modulation.1.{}", ("norm_out.linear.{}",), swapped=True)


def unet_pairs(tensors: Tensors) -> Iterator[ModulePair]:
    """Yield the modules of a U-Net that have different names in the two layouts."""
    modules = _modules_of(tensors)
    for authors, names in OUTER.items():
        chosen = [name for name in names if name in modules] if authors not in modules else names
        yield from (ModulePair(f"{authors}.{{}}", (f"{name}.{{}}",)) for name in chosen)
    for authors, own in (*_down_blocks(modules), *_up_blocks(modules), *_middle()):
        if ".resnets." in own:
            yield from (ModulePair(f"{authors}.{part}.{{}}", (f"{own}.{name}.{{}}",)) for part, name in RESNET.items())
        elif ".attentions." in own:
            start = authors if authors in modules else own
            rests = [module[len(start) :] for module in modules if module.startswith(f"{start}.")]
            yield from (ModulePair(f"{authors}{rest}.{{}}", (f"{own}{rest}.{{}}",)) for rest in sorted(rests))
        else:
            yield ModulePair(f"{authors}.{{}}", (f"{own}.{{}}",))


def _middle() -> Iterator[tuple[str, str]]:
    yield from (("middle_block.0", "mid_block.resnets.0"), ("middle_block.1", "mid_block.attentions.0"))
    yield "middle_block.2", "mid_block.resnets.1"


def _modules_of(tensors: Tensors) -> set[str]:
    """Return the modules that own a tensor, and the modules around them."""
    modules: set[str] = set()
    for name in tensors:
        while (name := name.rpartition(".")[0]) and name not in modules:
            modules.add(name)
    return modules


def _down_blocks(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield both names of each part of the blocks that go down."""
    block = depth = 0
    for n in count(1):
        authors, own = f"input_blocks.{n}", f"down_blocks.{block}"
        if f"{authors}.0.op" in modules or (
            f"{authors}.0" not in modules
            and f"{own}.resnets.{depth}" not in modules
            and f"{own}.downsamplers.0" in modules
        ):
            yield f"{authors}.0.op", f"{own}.downsamplers.0.conv"
            block, depth = block + 1, 0
        elif f"{authors}.0" in modules or f"{own}.resnets.{depth}" in modules:
            yield f"{authors}.0", f"{own}.resnets.{depth}"
            if f"{authors}.1" in modules or f"{own}.attentions.{depth}" in modules:
                yield f"{authors}.1", f"{own}.attentions.{depth}"
            depth += 1
        else:
            return


def _up_blocks(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield both names of each part of the blocks that go up."""
    block = depth = 0
    for n in count():
        authors, own = f"output_blocks.{n}", f"up_blocks.{block}"
        if not (f"{authors}.0" in modules or f"{own}.resnets.{depth}" in modules):
            return
        yield f"{authors}.0", f"{own}.resnets.{depth}"
        is_attention = f"{authors}.1" in modules and f"{authors}.1.conv" not in modules
        attends = is_attention or f"{own}.attentions.{depth}" in modules
        if attends:
            yield f"{authors}.1", f"{own}.attentions.{depth}"
        after = f"{authors}.{1 + attends}"
        is_last = f"{own}.resnets.{depth + 1}" not in modules
        if f"{after}.conv" in modules or (is_last and f"{own}.upsamplers.0" in modules):
            yield f"{after}.conv", f"{own}.upsamplers.0.conv"
            block, depth = block + 1, 0
        else:
            depth += 1
