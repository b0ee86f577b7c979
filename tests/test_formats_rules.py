"""Rules of formats that the golden files do not cover, on hand-made files: each with its formula, written out here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import DoraConvertError, RefError, UnsupportedError, UsageError

GOLDEN = Path(__file__).parent / "golden" / "formats"
HIDDEN, WIDE, HEADS = 16, 24, 4
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
generator = torch.Generator().manual_seed(5)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def near(norms: torch.Tensor) -> torch.Tensor:
    """Magnitudes near some norms, as training leaves them."""
    return norms * (1 + 0.05 * rand(*norms.shape))


@pytest.fixture(scope="module")
def tensors():
    """The base's tensors: rows and columns differ in length, so that norms tell something."""
    rows, columns = 1 + rand(HIDDEN, 1).abs() * 2, 1 + rand(1, HIDDEN).abs() * 2
    return {
        "model.embed_tokens.weight": rand(30, HIDDEN),
        f"{Q}.weight": rand(HIDDEN, HIDDEN) * rows * columns,
        f"{Q}.bias": rand(HIDDEN),
        f"{UP}.weight": rand(WIDE, HIDDEN),
        "transformer.h.0.attn.c_attn.weight": rand(HIDDEN, 3 * HIDDEN),
        "conv.weight": rand(6, 4, 3, 3),
    }


@pytest.fixture
def merge(tmp_path, tensors):
    """Merge a file, or a folder of files, into the base; the merged tensors in float64."""

    def run(files: dict[str, object], *, model_type: str = "llama", **options):
        base, folder = tmp_path / "base", tmp_path / "files"
        base.mkdir()
        folder.mkdir()
        save_file(tensors, base / "model.safetensors")
        config = {"model_type": model_type, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
        (base / "config.json").write_text(json.dumps(config))
        for name, content in files.items():
            write(folder / name, content)
        adapter = folder / next(iter(files)) if len(files) == 1 else folder
        dora_convert.merge(base, adapter, tmp_path / "out", on_notice=lambda _: None, **options)
        return {name: tensor.double() for name, tensor in load_file(tmp_path / "out/model.safetensors").items()}

    return run


def write(path, content):
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in content.items()})
    elif path.suffix in (".json", ".yaml"):
        path.write_text(json.dumps(content) if isinstance(content, dict) else content)
    elif path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)


def assert_near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).norm() < 1e-6 * wanted.norm()


def test_kohya_with_a_core(merge, tensors):
    """LoCon of a convolution with lora_mid: einsum mnkl,im,nj→ijkl; alpha/r, and alpha 0 means 1."""
    up, down, mid = rand(6, 2, 1, 1), rand(2, 4, 1, 1), rand(2, 2, 3, 3)
    names = {"up": up, "down": down, "mid": mid}
    file = {f"lycoris_conv.lora_{part}.weight": tensor for part, tensor in names.items()}
    merged = merge({"x.safetensors": file | {"lycoris_conv.alpha": torch.tensor(0.0)}})
    delta = torch.einsum("mnkl,im,nj->ijkl", mid.double(), up.double()[..., 0, 0], down.double()[..., 0, 0])
    assert_near(merged["conv.weight"], tensors["conv.weight"].double() + delta)


def test_kohya_convolution_and_full(merge, tensors):
    """A plain LoCon of a convolution, and a difference with a bias."""
    up, down, diff, bias = rand(6, 2, 1, 1), rand(2, 4, 3, 3), rand(HIDDEN, HIDDEN), rand(HIDDEN)
    flat = Q.replace(".", "_")
    file = {
        "lycoris_conv.lora_up.weight": up, "lycoris_conv.lora_down.weight": down,
        "lycoris_conv.alpha": torch.tensor(3.0), f"lycoris_{flat}.diff": diff, f"lycoris_{flat}.diff_b": bias,
    }  # fmt: skip
    merged = merge({"x.safetensors": file})
    delta = torch.einsum("or,rikl->oikl", up.double()[..., 0, 0], down.double())
    assert_near(merged["conv.weight"], tensors["conv.weight"].double() + 1.5 * delta)
    assert_near(merged[f"{Q}.weight"], tensors[f"{Q}.weight"].double() + diff.double())
    assert_near(merged[f"{Q}.bias"], tensors[f"{Q}.bias"].double() + bias.double())


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_the_base_tells_the_axis(merge, tensors, axis):
    """dora_scale without a second dimension on a square weight: the axis whose norms it is near."""
    W, A, B = tensors[f"{Q}.weight"].double(), rand(2, HIDDEN) * 0.1, rand(HIDDEN, 2) * 0.1
    V = W + B.double() @ A.double()
    dim = 1 if axis == "rows" else 0
    m = near(V.norm(dim=dim)).float()
    flat = f"lycoris_{Q.replace('.', '_')}"
    file = {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B, f"{flat}.dora_scale": m}
    merged = merge({"x.safetensors": file})
    assert_near(merged[f"{Q}.weight"], V * (m.double() / V.norm(dim=dim)).unsqueeze(dim))


def test_diffusers_without_metadata(merge, tensors):
    """No alpha anywhere: s is 1."""
    A, B = rand(2, HIDDEN), rand(WIDE, 2)
    name = f"transformer.{UP}"
    merged = merge({"pytorch_lora_weights.safetensors": {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}})
    assert_near(merged[f"{UP}.weight"], tensors[f"{UP}.weight"].double() + B.double() @ A.double())


def test_mlx_embeddings_and_alpha(merge, tensors):
    """scale·alpha/rank; of an embedding, rows are tokens: W + s·ab."""
    a, b, c, d = rand(30, 2), rand(2, HIDDEN), rand(HIDDEN, 2), rand(2, WIDE)
    file = {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b, f"{UP}.lora_a": c, f"{UP}.lora_b": d}
    config = {"lora_parameters": {"rank": 2, "alpha": 6, "scale": 0.5}, "lora_layers": 4}
    merged = merge({"adapters.safetensors": file, "adapter_config.json": config})
    embedding = "model.embed_tokens.weight"
    assert_near(merged[embedding], tensors[embedding].double() + 1.5 * a.double() @ b.double())
    assert_near(merged[f"{UP}.weight"], tensors[f"{UP}.weight"].double() + 1.5 * (c.double() @ d.double()).T)


def test_mlx_before_configs(merge, tensors):
    """The first releases: adapters.npz, whose scaling only the user knows."""
    a, b = rand(HIDDEN, 2), rand(2, WIDE)
    merged = merge({"adapters.npz": {f"{UP}.lora_a": a, f"{UP}.lora_b": b}}, scaling=20.0)
    assert_near(merged[f"{UP}.weight"], tensors[f"{UP}.weight"].double() + 20 * (a.double() @ b.double()).T)


def test_a_missing_alpha_is_asked_for(merge):
    """The message names the option and the tool's own default."""
    with pytest.raises(UnsupportedError) as caught:
        merge({"adapters.npz": {f"{UP}.lora_a": rand(HIDDEN, 2), f"{UP}.lora_b": rand(2, WIDE)}})
    assert "scaling" in f"{caught.value.hint}"
    assert "20" in f"{caught.value.hint}"


def test_an_alpha_that_is_known_is_refused(merge):
    """--alpha beside a file that has alpha."""
    A, B = rand(2, HIDDEN), rand(WIDE, 2)
    flat = f"lycoris_{UP.replace('.', '_')}"
    with pytest.raises(UsageError, match="alpha"):
        merge({"x.safetensors": {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B}}, alpha=3.0)


def test_merged_linear(merge, tensors):
    """loralib's MergedLinear on GPT-2's Conv1D: two of three blocks of columns; wrapped in model_state_dict."""
    A, B = rand(4, HIDDEN), rand(2 * HIDDEN, 2)
    name = "transformer.h.0.attn.c_attn"
    content = {"model_state_dict": {f"{name}.lora_A": A, f"{name}.lora_B": B}}
    merged = merge({"gpt2.pt": content}, model_type="gpt2", alpha=8.0, enable_lora="true,false,true")
    delta = torch.zeros(3 * HIDDEN, HIDDEN, dtype=torch.float64)
    delta[:HIDDEN] = B[:HIDDEN].double() @ A[:2].double()
    delta[2 * HIDDEN :] = B[HIDDEN:].double() @ A[2:].double()
    assert_near(merged[f"{name}.weight"], tensors[f"{name}.weight"].double() + 4 * delta.T)


def test_fsdp_custom_lora(merge, tensors):
    """lora_AB, whose alpha the file lacks."""
    A, B = rand(2, HIDDEN), rand(WIDE, 2)
    file = {f"{UP}.lora_AB.0.weight": A, f"{UP}.lora_AB.1.weight": B}
    merged = merge({"model_state_dict.safetensors": file}, alpha=16.0)
    assert_near(merged[f"{UP}.weight"], tensors[f"{UP}.weight"].double() + 8 * B.double() @ A.double())


def test_rasbt_without_one_weight(merge):
    """m as wide as the outputs: it divides by a norm of each sample, so no weight equals it."""
    file = {
        f"{UP}.linear.weight": rand(WIDE, HIDDEN), f"{UP}.lora.A": rand(HIDDEN, 2), f"{UP}.lora.B": rand(2, WIDE),
        f"{UP}.m": torch.ones(1, WIDE),
    }  # fmt: skip
    with pytest.raises(UnsupportedError, match="no single weight"):
        merge({"model.pt": file}, alpha=4.0)


@pytest.mark.parametrize("order", ["llama", "qwen2"])
def test_torchtune_puts_rows_in_order(merge, tensors, order):
    """Rows of q_proj are Meta's in Llama's family, and as they are in Qwen's."""
    A, B = rand(2, HIDDEN), rand(HIDDEN, 2)
    file = {"layers.0.attn.q_proj.lora_a.weight": A, "layers.0.attn.q_proj.lora_b.weight": B}
    merged = merge({"adapter_model.pt": file}, model_type=order, alpha=4.0)
    rows = B if order == "qwen2" else B.view(HEADS, 2, 2, 2).transpose(1, 2).reshape(HIDDEN, 2)
    assert_near(merged[f"{Q}.weight"], tensors[f"{Q}.weight"].double() + 2 * rows.double() @ A.double())


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_ai_toolkit_adds_outside_of_the_norm(merge, tensors, tmp_path, names):
    """(m/n)·(W + BA) + (s − 1)·BA, n of W + BA; alpha is in no file. Verified, undone, and never written as one DoRA."""
    A, B, m = rand(2, HIDDEN), rand(WIDE, 2) * 0.1, near(tensors[f"{UP}.weight"].norm(dim=1))
    flat = f"lora_unet_{UP.replace('.', '_')}"
    prefix, ends = (flat, ("lora_down", "lora_up")) if names == "kohya" else (f"transformer.{UP}", ("lora_A", "lora_B"))
    file = {f"{prefix}.{ends[0]}.weight": A, f"{prefix}.{ends[1]}.weight": B, f"{prefix}.magnitude": m}
    merged = merge({"style.safetensors": file}, alpha=6.0)
    BA = B.double() @ A.double()
    V = tensors[f"{UP}.weight"].double() + BA
    assert_near(merged[f"{UP}.weight"], m.double()[:, None] * V / V.norm(dim=1, keepdim=True) + 2 * BA)
    base, adapter = tmp_path / "base", tmp_path / "files/style.safetensors"
    assert dora_convert.verify(base, adapter, tmp_path / "out", alpha=6.0).verdict == "agree"
    dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert_near(back[f"{UP}.weight"], tensors[f"{UP}.weight"].double())
    for verb, options in ((dora_convert.to_lora, {"rank": 2}), (dora_convert.convert, {"to": "kohya"})):
        words = (base, adapter) if verb is dora_convert.to_lora else (adapter,)
        more = options if verb is dora_convert.to_lora else options | {"base": base}
        with pytest.raises(UnsupportedError) as caught:
            verb(*words, tmp_path / "new", alpha=6.0, **more)
        assert "is changed twice" in caught.value.text()
    save_file(file | {f"{prefix}.alpha": torch.tensor(2.0)}, tmp_path / "own.safetensors")
    with pytest.raises(UsageError, match="have it, or need none"):
        dora_convert.merge(base, tmp_path / "own.safetensors", tmp_path / "other", alpha=6.0)


def vera_file() -> dict[str, torch.Tensor]:
    """AdapterHub's VeRA of one module, without the matrices that modules share."""
    return {f"{UP}.loras.x.vera_D": rand(2, 2), f"{UP}.loras.x.vera_B": rand(WIDE, WIDE)}


def test_adapterhub_vera(merge, tensors):
    """The file of T5 or of a model without a head, with the shared matrices added from the model's state dict."""
    file, A, B = vera_file(), rand(2, HIDDEN), rand(WIDE, 2)
    D, E = (matrix.double() for matrix in file.values())
    shared = {"shared_parameters.x.lora_A": A, "shared_parameters.x.lora_B": B}
    config = {"config": {"architecture": "lora", "alpha": 6}, "version": "adapters.1.3.0"}
    merged = merge({"adapter.safetensors": file | shared, "adapter_config.json": config})
    assert_near(merged[f"{UP}.weight"], tensors[f"{UP}.weight"].double() + 3 * E @ B.double() @ D @ A.double())


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({}, "lacks its shared lora_A"),
        ({"shared_parameters.x.lora_A": (2, HIDDEN)}, "has no lora_B"),
        ({"shared_parameters.x.lora_A": (2, HIDDEN), "shared_parameters.x.lora_B": (WIDE, 3)}, "vera_D is"),
        ({"other.shared_parameters.x.lora_A": (2, HIDDEN)}, "lacks its shared lora_A"),
    ],
)
def test_adapterhub_vera_that_is_not_whole(merge, more, what):
    """Shared matrices that are missing, or have another rank."""
    with pytest.raises(DoraConvertError) as caught:
        merge({"pytorch_adapter.bin": vera_file() | {name: rand(*shape) for name, shape in more.items()}}, alpha=2.0)
    assert what in caught.value.text()


def test_adapterhub_without_a_config(merge):
    """Its alpha is asked for, and never assumed."""
    file = {f"{UP}.loras.x.lora_A": rand(2, HIDDEN), f"{UP}.loras.x.lora_B": rand(WIDE, 2)}
    with pytest.raises(UnsupportedError) as caught:
        merge({"pytorch_adapter.bin": file})
    assert "alpha= A" in f"{caught.value.hint}"


def test_adapterhub_dora_without_magnitudes(merge):
    """The config says DoRA, and one module has no magnitudes: never merged as a LoRA."""
    file = {f"{UP}.loras.x.lora_A": rand(2, HIDDEN), f"{UP}.loras.x.lora_B": rand(WIDE, 2)}
    config = {"config": {"architecture": "lora", "use_dora": True}, "version": "adapters.1.3.0"}
    with pytest.raises(DoraConvertError) as caught:
        merge({"pytorch_adapter.bin": file, "adapter_config.json": config})
    assert "has no m.weight" in caught.value.text()


def test_several_files_are_not_guessed(merge):
    """Two adapters in one folder: named, and none is taken."""
    file = {f"lycoris_{UP.replace('.', '_')}.lora_{part}.weight": rand(2, 2) for part in ("up", "down")}
    with pytest.raises(dora_convert.RefError, match="several adapters"):
        merge({"a.safetensors": file, "b.safetensors": file})


def test_inspect_without_alpha(tmp_path):
    """What is known is shown; the scaling is null, never NaN, and the refusal names the option."""
    file = tmp_path / "lora.pt"
    torch.save({f"{UP}.lora_A": rand(2, HIDDEN), f"{UP}.lora_B": rand(WIDE, 2)}, file)
    report = dora_convert.inspect(file).to_dict()
    assert (report["format"], report["modules"][0]["rank"], report["modules"][0]["scaling"]) == ("loralib", 2, None)
    assert "alpha" in report["refused"]["hint"]
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    "case",
    [
        "lycoris-loha/lycoris.safetensors",
        "fsdp-qlora-dora/model_state_dict.safetensors",
        "loralib-linear/pytorch_lora.bin",
        "diffusers-lora/pytorch_lora_weights.safetensors",
    ],
)
def test_two_adapters_in_a_folder(case, tmp_path):
    """Both files are named, and one of them alone is read."""
    file = GOLDEN / case
    for name in ("one", "two"):
        shutil.copy(file, tmp_path / f"{name}{file.suffix}")
    (tmp_path / "base").mkdir()
    with pytest.raises(RefError, match=r"several adapters: one.*, two") as caught:
        dora_convert.merge(tmp_path / "base", tmp_path, tmp_path / "out", alpha=16)
    assert f"one{file.suffix}" in caught.value.hint
    assert dora_convert.inspect(tmp_path / f"two{file.suffix}").kind == "adapter"
