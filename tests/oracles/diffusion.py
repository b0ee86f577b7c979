"""Merge adapters of diffusion models in every naming, and compare with diffusers' own loading, fusing and conversion.

    TOOLS/python tests/oracles/diffusion.py DORA_CONVERT [GOLDEN.json]

TOOLS is an environment with torch, transformers, diffusers and peft. Small models have the topology of SD 1.5, SDXL
and Flux. Each adapter goes onto the pipeline in folders and onto the single file. The truth is diffusers'
`load_lora_weights` and `fuse_lora`; the names of a single file are judged by diffusers' conversion of it. Every weight
is within 1e-6 relative. GOLDEN.json is written anew: pairs of names for tests/test_diffusion_names.py.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from dora_convert.naming.layouts import FLUX_DOUBLE, FLUX_OUTER, FLUX_SINGLE, OPEN_CLIP, unet_pairs

Tensors = dict[str, torch.Tensor]
BOUND, RANK, ALPHA = 1e-6, 2, 6.0
WIDTH = 16
MODULES = (
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "to_q", "to_k", "to_v", "to_out.0",
    "proj_in", "ff.net.0.proj", "ff.net.2", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2",
)  # fmt: skip
"""Ends of the modules that get a LoRA."""
torch.manual_seed(5)


def command(*words: object) -> None:
    """Run our command; raises CalledProcessError with its message on stderr."""
    subprocess.run([sys.argv[1], *map(str, words), "--quiet"], check=True, stdout=subprocess.DEVNULL)


def unet(kind: str) -> diffusers.UNet2DConditionModel:
    """Return a small U-Net with the blocks of SD 1.5 or of SDXL."""
    attend, plain = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    options: dict[str, Any] = {"cross_attention_dim": WIDTH, "norm_num_groups": 4, "attention_head_dim": 2}
    if kind == "sd15":
        options |= {"down_block_types": (*[attend[0]] * 3, attend[1]), "up_block_types": (plain[1], *[plain[0]] * 3)}
        options |= {"block_out_channels": (8, 8, 12, 12)}
    else:
        options |= {
            "down_block_types": (attend[1], attend[0], attend[0]),
            "up_block_types": (*[plain[0]] * 2, plain[1]),
        }
        options |= {"block_out_channels": (8, 8, 12), "use_linear_projection": True, "addition_time_embed_dim": 4}
        options |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 24 + WIDTH}
        options |= {"transformer_layers_per_block": (1, 2, 2)}
    return diffusers.UNet2DConditionModel(**options)


def text_encoder(*, projected: bool) -> torch.nn.Module:
    """Return a small CLIP text model, with a projection as SDXL's second one."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, projection_dim=WIDTH,
        vocab_size=40, max_position_embeddings=8, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def pipeline(kind: str, folder: Path) -> diffusers.DiffusionPipeline:
    """Write a small pipeline in folders, and return it."""
    parts: dict[str, Any] = {"unet": unet(kind), "text_encoder": text_encoder(projected=False)}
    parts |= {"text_encoder_2": text_encoder(projected=True)} if kind == "sdxl" else {}
    for name, part in parts.items():
        for parameter in part.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    rest = {"vae": None, "tokenizer": None, "scheduler": None}
    if kind == "sdxl":
        return diffusers.StableDiffusionXLPipeline(**parts, **rest, tokenizer_2=None, add_watermarker=False)
    return diffusers.StableDiffusionPipeline(
        **parts, **rest, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def authors_unet(tensors: Tensors) -> Tensors:
    """Return a U-Net under the authors' names, which our table gives and diffusers' conversion judges."""
    names = {
        pair.diffusers[0].format(leaf): pair.authors.format(leaf)
        for pair in unet_pairs(dict.fromkeys(tensors))  # type: ignore[arg-type] # names alone count
        for leaf in ("weight", "bias")
    }
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def with_text_model(tensors: Tensors) -> Tensors:
    """Return CLIP's tensors with the outer module that single files have."""
    return {
        name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": tensor
        for name, tensor in tensors.items()
    }


def authors_clip(tensors: Tensors) -> Tensors:
    """Return a text model under OpenCLIP's names."""
    tensors, found = with_text_model(tensors), Tensors()
    for n in range(2):
        for authors, names in OPEN_CLIP.items():
            for leaf in ("weight", "bias"):
                name = f"{authors}.{{}}" if "{}" not in authors else authors
                values = [tensors[f"text_model.encoder.layers.{n}.{each}.{leaf}"] for each in names]
                found[f"transformer.resblocks.{n}.{name.format(leaf)}"] = torch.cat(values)
    found["token_embedding.weight"] = tensors["text_model.embeddings.token_embedding.weight"]
    found["positional_embedding"] = tensors["text_model.embeddings.position_embedding.weight"]
    found |= {f"ln_final.{leaf}": tensors[f"text_model.final_layer_norm.{leaf}"] for leaf in ("weight", "bias")}
    return found | {"text_projection": tensors["text_projection.weight"].T.contiguous()}


def single_file(kind: str, pipe: diffusers.DiffusionPipeline) -> Tensors:
    """Return a pipeline's weights as the authors' single file has them."""
    found = {f"model.diffusion_model.{name}": T for name, T in authors_unet(pipe.unet.state_dict()).items()}
    one = with_text_model(pipe.text_encoder.state_dict())
    if kind == "sd15":
        return found | {f"cond_stage_model.transformer.{name}": T for name, T in one.items()}
    two = authors_clip(pipe.text_encoder_2.state_dict())
    found |= {f"conditioner.embedders.0.transformer.{name}": T for name, T in one.items()}
    return found | {f"conditioner.embedders.1.model.{name}": T for name, T in two.items()}


def converted(kind: str, pipe: diffusers.DiffusionPipeline, tensors: Tensors) -> Tensors:
    """Return a single file's weights as diffusers converts them, by component and name."""
    config = dict(pipe.unet.config)
    found = {f"unet/{k}": T for k, T in single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), config).items()}
    one = single_file_utils.convert_ldm_clip_checkpoint(dict(tensors))
    found |= {f"text_encoder/{k}": T for k, T in one.items()}
    if kind == "sdxl":
        start = "conditioner.embedders.1.model."
        two = single_file_utils.convert_open_clip_checkpoint(pipe.text_encoder_2, dict(tensors), prefix=start)
        found |= {f"text_encoder_2/{k}": T for k, T in two.items()}
    return found


def adapters(kind: str, pipe: diffusers.DiffusionPipeline) -> Iterator[tuple[str, Tensors]]:
    """Yield a LoRA of many modules, in kohya's file with both namings of the U-Net, and in diffusers'."""
    factors: dict[tuple[str, str], Tensors] = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        for name, module in model.named_modules() if model else ():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name.endswith(MODULES):
                shape = module.weight.shape
                ends = ((RANK, *shape[1:]), (shape[0], RANK, *[1] * (len(shape) - 2)))
                factors[component, name] = {"down": torch.randn(ends[0]) * 0.3, "up": torch.randn(ends[1]) * 0.3}
    authors = {}
    for pair in unet_pairs(dict.fromkeys(pipe.unet.state_dict())):  # type: ignore[arg-type] # names alone count
        authors[pair.diffusers[0].removesuffix(".{}")] = pair.authors.removesuffix(".{}")
    several = hasattr(pipe, "text_encoder_2")
    prefixes = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_" if several else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }
    for naming in ("diffusers' names", "the authors' names"):
        found = Tensors()
        for (component, name), parts in factors.items():
            own = name if name.startswith("text_model.") or component == "unet" else f"text_model.{name}"
            own = authors.get(own, own) if naming == "the authors' names" and component == "unet" else own
            flat = prefixes[component] + own.replace(".", "_")
            found |= {f"{flat}.lora_{part}.weight": T for part, T in parts.items()}
            found[f"{flat}.alpha"] = torch.tensor(ALPHA)
        yield f"kohya in {naming}", found
    yield (
        "diffusers",
        {
            f"{component}.{name}.lora_{'A' if part == 'down' else 'B'}.weight": T
            * (ALPHA / RANK if part == "up" else 1)
            for (component, name), parts in factors.items()
            for part, T in parts.items()
        },
    )


def state_of(pipe: diffusers.DiffusionPipeline) -> Tensors:
    """Return a pipeline's weights by component and name, without the layers that PEFT puts around them."""
    found = Tensors()
    for component in ("unet", "text_encoder", "text_encoder_2"):
        if model := getattr(pipe, component, None):
            for name, tensor in model.state_dict().items():
                if "lora_" not in name:
                    found[f"{component}/{name.replace('.base_layer', '')}"] = tensor.clone()
    return found


def folder_state(folder: Path) -> Tensors:
    """Return a written pipeline's weights by component and name."""
    files = [file for file in folder.glob("*/*.safetensors") if file.parent.name != "dora_convert"]
    return {f"{file.parent.name}/{name}": T for file in files for name, T in load_file(file).items()}


def error(truth: Tensors, got: Tensors) -> float:
    """Return the largest relative error of any weight; CLIP's outer module may be in the names or not."""
    plain = {name.replace("/text_model.", "/"): tensor for name, tensor in got.items()}
    wanted = {name.replace("/text_model.", "/"): tensor for name, tensor in truth.items() if "position_ids" not in name}
    assert plain.keys() == wanted.keys(), plain.keys() ^ wanted.keys()
    return float(max((plain[name] - T).norm() / T.norm() for name, T in wanted.items()))


def unets(work: Path, golden: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield an error for each adapter on SD 1.5 and SDXL, in folders and in a single file."""
    for kind in ("sd15", "sdxl"):
        base = work / kind
        pipe = pipeline(kind, base)
        before, single = state_of(pipe), single_file(kind, pipe)
        yield f"{kind}: diffusers converts our names of a single file", error(before, converted(kind, pipe, single))
        save_file(single, base / "single.safetensors")
        golden[kind] = listing(kind, pipe, single)
        truth = before
        for name, adapter in adapters(kind, pipe):
            file = base / f"{name.replace(' ', '-')}.safetensors"
            save_file({key: tensor.contiguous() for key, tensor in adapter.items()}, file)
            if "authors" not in name or kind == "sdxl":  # diffusers maps the authors' names for SDXL alone
                truth = fused(pipeline_of(kind, base, pipe), adapter)
            changed = sum(not torch.equal(T, before[key]) for key, T in truth.items())
            assert changed == sum(key.endswith(("lora_down.weight", "lora_A.weight")) for key in adapter), changed
            out = work / f"{kind}-{file.stem}"
            command("merge", base, file, out)
            yield f"{kind}: {name} on the folders ({changed} weights)", error(truth, folder_state(out))
            command("merge", base / "single.safetensors", file, out.with_suffix(".single"))
            (made,) = out.with_suffix(".single").glob("*.safetensors")
            merged = load_file(made)
            assert merged.keys() == single.keys()
            yield f"{kind}: {name} on the single file", error(truth, converted(kind, pipe, merged))


def fused(pipe: diffusers.DiffusionPipeline, adapter: Tensors) -> Tensors:
    """Return a pipeline's weights after diffusers has loaded and fused an adapter."""
    pipe.load_lora_weights(dict(adapter))
    pipe.fuse_lora(components=[name for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, name)])
    return state_of(pipe)


def pipeline_of(kind: str, base: Path, pipe: diffusers.DiffusionPipeline) -> diffusers.DiffusionPipeline:
    """Return a pipeline anew, with the weights of its folders."""
    parts = {"unet": diffusers.UNet2DConditionModel.from_pretrained(base / "unet")}
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipe, name, None):
            parts[name] = type(getattr(pipe, name)).from_pretrained(base / name)
    return type(pipe)(**dict.fromkeys(pipe.components) | parts | extra(kind))


def extra(kind: str) -> dict[str, Any]:
    """Return the options of a pipeline that are no components."""
    return {"add_watermarker": False} if kind == "sdxl" else {"requires_safety_checker": False}


def listing(kind: str, pipe: diffusers.DiffusionPipeline, single: Tensors) -> dict[str, str]:
    """Return one module of each block: the single file's name, and the name that diffusers gives its tensor."""
    places = {tensor.data_ptr(): name for name, tensor in converted(kind, pipe, single).items()}
    ends = ("in_layers.2.weight", "op.weight", ".conv.weight", "proj_in.weight", "embed.0.weight", "out.2.weight")
    whole = ("input_blocks.4.0.", "label_emb")
    return {
        name.removesuffix(".weight"): places[tensor.data_ptr()].removesuffix(".weight")
        for name, tensor in single.items()
        if tensor.data_ptr() in places
        and name.endswith("weight")
        and (name.endswith(ends) or any(w in name for w in whole))
    }


def flux_weights() -> tuple[Tensors, Tensors]:
    """Return a small Flux under its authors' names, and as diffusers' conversion makes it."""
    shapes: dict[str, tuple[int, ...]] = {}
    h = WIDTH
    for n in range(2):
        for name in FLUX_DOUBLE:
            rows, columns = (3 * h, h) if "qkv" in name else (h, h)
            rows, columns = (6 * h, h) if "mod" in name else (rows, columns)
            rows, columns = {"0": (4 * h, h), "2": (h, 4 * h)}.get(name[-1], (rows, columns))
            shapes[f"double_blocks.{n}.{name}"] = (8,) if name.endswith("scale") else (rows, columns)
        for name in FLUX_SINGLE:
            size = {"linear1": (7 * h, h), "linear2": (h, 5 * h), "modulation.lin": (3 * h, h)}
            shapes[f"single_blocks.{n}.{name}"] = size.get(name, (8,))
    shapes |= dict.fromkeys(FLUX_OUTER, (h, h)) | {"final_layer.adaLN_modulation.1": (2 * h, h)}
    tensors = Tensors()
    for name, shape in shapes.items():
        if name.endswith("scale"):
            tensors[name] = torch.randn(shape)
        else:
            tensors |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    return tensors, flux_converted(tensors)


def flux_converted(tensors: Tensors) -> Tensors:
    """Return what diffusers makes of a Flux file; its width is a constant in diffusers' source."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert "inner_dim = 3072" in source
    scope = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {WIDTH}"), scope)
    made = scope["convert_flux_transformer_checkpoint_to_diffusers"](dict(tensors))
    return {name: tensor.contiguous().clone() for name, tensor in made.items()}


def flux(work: Path, golden: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield an error for adapters of Flux with fused and with single projections, on both layouts of the base."""
    authors, own = flux_weights()
    base = work / "flux"
    (base / "transformer").mkdir(parents=True)
    (base / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    save_file(own, base / "transformer/diffusion_pytorch_model.safetensors")
    save_file({f"model.diffusion_model.{name}": T for name, T in authors.items()}, base / "single.safetensors")
    save_file(authors, base / "bare.safetensors")
    adapter, file = Tensors(), base / "kohya.safetensors"
    truth_authors = dict(authors)
    for name in (key.removesuffix(".weight") for key, T in authors.items() if T.dim() == 2):
        W = authors[f"{name}.weight"]
        down, up = torch.randn(RANK, W.shape[1]), torch.randn(W.shape[0], RANK)
        flat = f"lora_unet_{name.replace('.', '_')}"
        adapter |= {
            f"{flat}.lora_down.weight": down,
            f"{flat}.lora_up.weight": up,
            f"{flat}.alpha": torch.tensor(ALPHA),
        }
        truth_authors[f"{name}.weight"] = (W.double() + ALPHA / RANK * (up.double() @ down.double())).float()
    save_file(adapter, file)
    yield from on_flux(work, base, file, "kohya's fused names", truth_authors, flux_converted(truth_authors))
    adapter, truth = Tensors(), dict(own)
    for name in (key.removesuffix(".weight") for key, T in own.items() if T.dim() == 2):
        W = own[f"{name}.weight"]
        A, B = torch.randn(RANK, W.shape[1]), torch.randn(W.shape[0], RANK)
        adapter |= {f"transformer.{name}.lora_A.weight": A, f"transformer.{name}.lora_B.weight": B}
        truth[f"{name}.weight"] = (W.double() + B.double() @ A.double()).float()
    save_file(adapter, base / "diffusers.safetensors")
    yield from on_flux(work, base, base / "diffusers.safetensors", "diffusers' names", None, truth)
    golden["flux"] = {
        name.removesuffix(".weight"): [own_name.removesuffix(".weight") for own_name in same_rows(T, own)]
        for name, T in authors.items()
        if T.dim() == 2 and ".1." not in name.replace("adaLN_modulation.1", "")
    }


def same_rows(tensor: torch.Tensor, others: Tensors) -> list[str]:
    """Return the tensors that hold rows of another, in the order of the rows."""
    rows = {tuple(row.tolist()): n for n, row in enumerate(tensor)}
    first = {name: tuple(T[0].tolist()) for name, T in others.items() if T.dim() > 1}
    starts = {rows[row]: name for name, row in first.items() if row in rows}
    return [starts[n] for n in sorted(starts)]


def on_flux(
    work: Path, base: Path, file: Path, name: str, authors: Tensors | None, own: Tensors
) -> Iterator[tuple[str, float]]:
    """Yield the errors of one adapter on the folders, on a single file, and on the bare transformer."""
    command("merge", base, file, work / f"flux-{file.stem}")
    got = {key.partition("/")[2]: T for key, T in folder_state(work / f"flux-{file.stem}").items()}
    yield f"flux: {name} on the folders", error(own, got)
    for kind in ("single", "bare"):
        command("merge", base / f"{kind}.safetensors", file, work / f"flux-{file.stem}-{kind}")
        (made,) = (work / f"flux-{file.stem}-{kind}").glob("*.safetensors")
        merged = {key.removeprefix("model.diffusion_model."): T for key, T in load_file(made).items()}
        yield f"flux: {name} on the {kind} file", error(own, flux_converted(merged))
        if authors:
            yield f"flux: {name} on the {kind} file, unconverted", error(authors, merged)


def lines(pairs: dict[str, Any]) -> str:
    """Return pairs of names as JSON, a line each."""
    return ",\n".join(f"  {json.dumps(name)}: {json.dumps(own)}" for name, own in pairs.items())


def main() -> None:
    """Run every comparison; exit with 1 if one is off."""
    wrong, golden = 0, dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        for suite in (unets, flux):
            for name, off in suite(Path(folder), golden):
                wrong += not off < BOUND
                sys.stdout.write(f"{'ok ' if off < BOUND else 'OFF'} {off:.1e}  {name}\n")
                sys.stdout.flush()
    for file in sys.argv[2:]:
        models = (f" {json.dumps(kind)}: {{\n{lines(pairs)}\n }}" for kind, pairs in golden.items())
        Path(file).write_text("{\n" + ",\n".join(models) + "\n}\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
