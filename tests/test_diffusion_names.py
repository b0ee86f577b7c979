"""Diffusion models under both sets of names: kohya's and diffusers' adapters on pipelines and on single files.

tests/golden/diffusion/names.json holds pairs of names that diffusers' own conversion made (tests/oracles/diffusion.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import PlanError, UnsupportedError

NAMES = json.loads((Path(__file__).parent / "golden/diffusion/names.json").read_text())
OUT, IN, RANK, ALPHA = 6, 4, 2, 6.0
Tensors = dict[str, torch.Tensor]


def rand(*shape: int) -> torch.Tensor:
    """Random numbers, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def numbered(names: list[str], *shape: int) -> Tensors:
    """A weight for each name, all different."""
    return {f"{name}.weight": rand(*shape) + number for number, name in enumerate(names)}


def write_pipeline(folder: Path, tensors: Tensors) -> Path:
    """Write weights named <component>/<name> as a pipeline's folders."""
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    for component in {name.partition("/")[0] for name in tensors}:
        (folder / component).mkdir()
        own = {name.partition("/")[2]: T for name, T in tensors.items() if name.startswith(f"{component}/")}
        save_file(own, folder / component / "model.safetensors")
    return folder


def write_file(file: Path, tensors: Tensors) -> Path:
    """Write a single file."""
    save_file(tensors, file)
    return file


def read_back(out: Path) -> Tensors:
    """Every weight of a merge; those of a pipeline as <component>/<name>."""
    found = Tensors()
    for file in out.rglob("*.safetensors"):
        inside = file.relative_to(out).parts
        if inside[0] != "dora_convert":
            found |= {"/".join([*inside[:-1], name]): tensor for name, tensor in load_file(file).items()}
    return found


def kohya(modules: dict[str, tuple[int, int]], *, dora: str = "") -> Tensors:
    """A LoRA of kohya's names for modules of a size, with magnitudes by rows or columns if asked."""
    found = Tensors()
    for number, (name, (rows, columns)) in enumerate(modules.items()):
        found[f"{name}.lora_down.weight"] = rand(RANK, columns) + number
        found[f"{name}.lora_up.weight"] = rand(rows, RANK)
        found[f"{name}.alpha"] = torch.tensor(ALPHA)
        if dora:
            found[f"{name}.dora_scale"] = rand(rows, 1).abs() if dora == "rows" else rand(1, columns).abs()
    return found


def expected(W: torch.Tensor, adapter: Tensors, module: str, rows: slice = slice(None)) -> torch.Tensor:
    """W + s·BA, or m·V/‖V‖, in float64, for some rows of the module."""
    up, down = adapter[f"{module}.lora_up.weight"].double()[rows], adapter[f"{module}.lora_down.weight"].double()
    V = W.double() + ALPHA / RANK * up @ down
    if (m := adapter.get(f"{module}.dora_scale")) is None:
        return V
    return m.double()[rows] * V / V.norm(dim=1, keepdim=True) if len(m) > 1 else m.double() * V / V.norm(dim=0)


def flat(name: str) -> str:
    """kohya's name of a module, under either layout."""
    component, inside, module = name.rpartition("/")
    module = module.removeprefix("model.diffusion_model.")
    return {"": "lora_unet_", "unet": "lora_unet_"}[component if inside else ""] + module.replace(".", "_")


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("names", ["authors", "diffusers"])
@pytest.mark.parametrize("base", ["folders", "single"])
def test_unet_in_both_names(kind, names, base, tmp_path):
    """Every block of the U-Net is found, whichever side has whose names, and keeps the base's names."""
    pairs = NAMES[kind]
    own = list(pairs.values()) if base == "folders" else list(pairs)
    tensors = numbered(own, OUT, IN)
    folder = (
        write_pipeline(tmp_path / "b", tensors)
        if base == "folders"
        else write_file(tmp_path / "b.safetensors", tensors)
    )
    asked = [flat(name) for name in (pairs if names == "authors" else pairs.values())]
    adapter = kohya(dict.fromkeys(asked, (OUT, IN)))
    dora_convert.merge(folder, write_file(tmp_path / "a.safetensors", adapter), tmp_path / "out")
    merged = read_back(tmp_path / "out")
    assert merged.keys() == tensors.keys()
    for name, module in zip(own, asked, strict=True):
        wanted = expected(tensors[f"{name}.weight"], adapter, module)
        assert torch.equal(merged[f"{name}.weight"], wanted.float()), name


H = 8
FLUX_ROWS = {"img_attn.qkv": 3 * H, "txt_attn.qkv": 3 * H, "linear1": 7 * H, "adaLN_modulation.1": 2 * H}


def flux() -> tuple[Tensors, Tensors]:
    """Flux under its authors' names, and cut as diffusers has it."""
    fused, parts = Tensors(), Tensors()
    for number, (name, own) in enumerate(NAMES["flux"].items()):
        rows = next((rows for end, rows in FLUX_ROWS.items() if name.endswith(end)), H)
        W = fused[f"{name}.weight"] = rand(rows, H) + number
        for module, piece in zip(own, cut(name, W), strict=True):
            parts[f"transformer/{module}.weight"] = piece
    return fused, parts


def cut(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The parts of one of Flux's tensors: q, k, v, the rest; of the last modulation the halves in the other order."""
    if name.endswith("adaLN_modulation.1"):
        return [torch.cat(tensor.chunk(2)[::-1])]
    sizes = {3 * H: [H] * 3, 7 * H: [H, H, H, 4 * H]}.get(len(tensor), [len(tensor)])
    return [part.contiguous() for part in tensor.split(sizes)]


@pytest.mark.parametrize("dora", ["", "rows"])
def test_flux_fused_adapter_on_parts(dora, tmp_path):
    """kohya's fused projections are cut for the pipeline's q, k and v, and are whole on the single file."""
    fused, parts = flux()
    names = {f"lora_unet_{name[:-7].replace('.', '_')}": name for name in fused}
    adapter = kohya({module: tuple(fused[name].shape) for module, name in names.items()}, dora=dora)
    file = write_file(tmp_path / "a.safetensors", adapter)
    wanted = {name: expected(fused[name], adapter, module) for module, name in names.items()}
    dora_convert.merge(write_pipeline(tmp_path / "b", parts), file, tmp_path / "out")
    merged = read_back(tmp_path / "out")
    for name, own in NAMES["flux"].items():
        for module, piece in zip(own, cut(name, wanted[f"{name}.weight"]), strict=True):
            torch.testing.assert_close(merged[f"transformer/{module}.weight"], piece.float(), rtol=1e-6, atol=1e-6)
    single = write_file(tmp_path / "b.safetensors", {f"model.diffusion_model.{n}": T for n, T in fused.items()})
    dora_convert.merge(single, file, tmp_path / "whole")
    merged = read_back(tmp_path / "whole")
    for name, value in wanted.items():
        torch.testing.assert_close(merged[f"model.diffusion_model.{name}"], value.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dora", ["", "rows"])
def test_flux_parts_on_fused_base(dora, tmp_path):
    """Separate q, k and v go into their rows of the fused tensor; verify agrees, and unmerge restores every bit."""
    fused, parts = flux()
    modules = {f"lora_transformer_{n[12:-7].replace('.', '_')}": tuple(T.shape) for n, T in parts.items()}
    adapter = kohya(modules, dora=dora)
    base, file = write_file(tmp_path / "b.safetensors", fused), write_file(tmp_path / "a.safetensors", adapter)
    dora_convert.merge(base, file, tmp_path / "out", undo="exact")
    merged = read_back(tmp_path / "out")
    assert merged.keys() == fused.keys()
    for name, own in NAMES["flux"].items():
        pieces = cut(name, merged[f"{name}.weight"])
        for module, piece in zip(own, pieces, strict=True):
            flat_name = f"lora_transformer_{module.replace('.', '_')}"
            wanted = expected(parts[f"transformer/{module}.weight"], adapter, flat_name)
            torch.testing.assert_close(piece, wanted.float(), rtol=1e-6, atol=1e-6)
    assert dora_convert.verify(base, file, tmp_path / "out").verdict == "agree"
    dora_convert.unmerge(tmp_path / "out", file, tmp_path / "back")
    assert all(torch.equal(T, fused[name]) for name, T in read_back(tmp_path / "back").items())


def test_flux_columns(tmp_path):
    """Norms by columns: right on whole tensors, in whatever order of rows, and refused for a part of one."""
    fused, parts = flux()
    base, file = write_file(tmp_path / "b.safetensors", fused), tmp_path / "a.safetensors"
    name, module = "final_layer.adaLN_modulation.1.weight", "lora_transformer_norm_out_linear"
    adapter = kohya({module: (2 * H, H)}, dora="columns")
    dora_convert.merge(base, write_file(file, adapter), tmp_path / "out")
    wanted = expected(parts["transformer/norm_out.linear.weight"], adapter, module)
    torch.testing.assert_close(read_back(tmp_path / "out")[name], torch.cat(wanted.chunk(2)[::-1]).float())
    q = "lora_transformer_transformer_blocks_0_attn_to_q"
    with pytest.raises(PlanError) as caught:
        dora_convert.merge(base, write_file(file, kohya({q: (H, H)}, dora="columns")), tmp_path / "other")
    assert (
        "has magnitudes by columns, for 8 outputs of double_blocks.0.img_attn.qkv.weight alone" in caught.value.text()
    )


OPEN = "conditioner.embedders.1.model."
LAYER = f"{OPEN}transformer.resblocks.0."


def test_text_models_of_a_single_file(tmp_path):
    """CLIP with its outer module and without, OpenCLIP's fused q, k and v, and its projection, stored as (in, out)."""
    clip = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    tensors = {
        clip: rand(OUT, IN), f"{LAYER}attn.in_proj_weight": rand(3 * IN, IN), f"{LAYER}attn.in_proj_bias": rand(3 * IN),
        f"{LAYER}mlp.c_fc.weight": rand(OUT, IN), f"{OPEN}text_projection": rand(IN, OUT),
    }  # fmt: skip
    layer = "lora_te2_text_model_encoder_layers_0_"
    modules = {
        "lora_te1_encoder_layers_0_mlp_fc1": (OUT, IN), f"{layer}self_attn_k_proj": (IN, IN),
        f"{layer}self_attn_v_proj": (IN, IN), f"{layer}mlp_fc1": (OUT, IN), "lora_te2_text_projection": (OUT, IN),
    }  # fmt: skip
    tensors["model_ema.decay"] = rand(1)
    adapter = kohya(modules)
    base, file = write_file(tmp_path / "b.safetensors", tensors), write_file(tmp_path / "a.safetensors", adapter)
    report = dora_convert.merge(base, file, tmp_path / "out")
    assert "has averaged weights (model_ema.…)" in " ".join(report.warnings)
    merged = read_back(tmp_path / "out")
    fused = tensors[f"{LAYER}attn.in_proj_weight"].double()
    for part, rows in (("k", slice(IN, 2 * IN)), ("v", slice(2 * IN, None))):
        fused[rows] = expected(fused[rows], adapter, f"{layer}self_attn_{part}_proj")
    wanted = {
        clip: expected(tensors[clip], adapter, "lora_te1_encoder_layers_0_mlp_fc1"),
        f"{LAYER}attn.in_proj_weight": fused, f"{LAYER}attn.in_proj_bias": tensors[f"{LAYER}attn.in_proj_bias"],
        f"{LAYER}mlp.c_fc.weight": expected(tensors[f"{LAYER}mlp.c_fc.weight"], adapter, f"{layer}mlp_fc1"),
        "model_ema.decay": tensors["model_ema.decay"],
        f"{OPEN}text_projection": expected(tensors[f"{OPEN}text_projection"].T, adapter, "lora_te2_text_projection").T,
    }  # fmt: skip
    assert merged.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(merged[name], value.float()), name


def test_two_modules_of_one_name(tmp_path):
    """A flattened name that two modules have: both are named, and neither is taken."""
    base = write_file(
        tmp_path / "b.safetensors", {"x.up_down.weight": rand(OUT, IN), "x.up.down.weight": rand(OUT, IN)}
    )
    file = write_file(tmp_path / "a.safetensors", kohya({"lora_unet_x_up_down": (OUT, IN)}))
    with pytest.raises(PlanError) as caught:
        dora_convert.merge(base, file, tmp_path / "out")
    assert "may be for any of x.up.down, x.up_down" in caught.value.text()


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_written_for_a_single_file(to, tmp_path):
    """Components get their prefixes, and diffusers its own names: the new file merges to the same weights."""
    tensors = numbered(list(NAMES["sd15"]), OUT, IN)
    base = write_file(tmp_path / "b.safetensors", tensors)
    adapter = write_file(tmp_path / "a.safetensors", kohya({flat(name): (OUT, IN) for name in NAMES["sd15"]}))
    dora_convert.convert(adapter, tmp_path / "new", to=to, base=base)
    (file,) = (tmp_path / "new").glob("*.safetensors")
    ends = (".lora_down.weight", ".lora_A.weight")
    names = {name.rpartition(end)[0] for name in load_file(file) for end in ends if name.endswith(end)}
    own = [name.replace("/", ".", 1) for name in NAMES["sd15"].values()]
    assert names == set(own if to == "diffusers" else map(flat, NAMES["sd15"]))
    for each in (adapter, tmp_path / "new"):
        dora_convert.merge(base, each, tmp_path / f"out-{each.name}")
    one, two = (read_back(tmp_path / f"out-{name}") for name in ("a.safetensors", "new"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-6, atol=1e-6) for name in tensors)


def test_formats_are_checked_before_fitting(tmp_path):
    """A format refuses before anything is computed, and nothing is left."""
    fused, _ = flux()
    base = write_file(tmp_path / "b.safetensors", fused)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    adapter = write_file(tmp_path / "a.safetensors", kohya({name: (3 * H, H)}))
    for to, why in (("diffusers", "lies otherwise in diffusers"), ("mlx", "is outside of the layers")):
        with pytest.raises(UnsupportedError) as caught:
            dora_convert.to_lora(base, adapter, tmp_path / "out", rank=2, format=to)
        assert why in caught.value.text()
        assert not list(tmp_path.glob("out*"))
    dora_convert.to_lora(base, adapter, tmp_path / "out", rank=H, format="kohya")
    assert f"{name}.lora_up.weight" in load_file(tmp_path / "out/adapter.safetensors")
