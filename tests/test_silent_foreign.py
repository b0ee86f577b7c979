"""Adapters of other tools: until one is read, the error and inspect say what it is, and nothing that is not so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file

import dora_convert
from dora_convert.errors import DoraConvertError

from .toy import write_json

A, B, M = torch.randn(4, 40), torch.randn(96, 4), torch.rand(96)
UP = "model.layers.0.mlp.up_proj"


def kohya(path: Path) -> Path:
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(4.0)}
    save_file(tensors, path, {"ss_network_module": "networks.lora", "ss_network_dim": "4"})
    return path


def kohya_without_metadata(path: Path) -> Path:
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    save_file({f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}, path)
    return path


def lycoris(path: Path) -> Path:
    name = "lycoris_model_layers_0_mlp_up_proj"
    tensors = {f"{name}.hada_w1_a": B, f"{name}.hada_w1_b": A, f"{name}.hada_w2_a": B + 1, f"{name}.hada_w2_b": A + 1}
    save_file(tensors | {f"{name}.alpha": torch.tensor(4.0)}, path)
    return path


def lycoris_dora(path: Path) -> Path:
    name = "lycoris_model_layers_0_mlp_up_proj"
    save_file(
        {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.dora_scale": M[:, None].contiguous()},
        path,
    )
    return path


def diffusers(path: Path) -> Path:
    name = "unet.down_blocks.0.attentions.0.to_q"
    save_file({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, path)
    return path


def in_folder(name: str, write: Callable[[Path], object]) -> Callable[[Path], Path]:
    """The same as a file in a folder of its own."""

    def make(path: Path) -> Path:
        folder = path.with_suffix("")
        folder.mkdir()
        write(folder / name)
        return folder

    return make


def with_config(write: Callable[[Path], Path], config: dict[str, object]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        folder = write(path)
        write_json(folder / "adapter_config.json", config)
        return folder

    return make


def saved(tensors: dict[str, torch.Tensor]) -> Callable[[Path], Path]:
    """A file of tensors, by its ending."""

    def write(path: Path) -> Path:
        if path.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        else:
            torch.save(tensors, path)
        return path

    return write


def gguf_adapter(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for name, tensor in (("lora_a", A), ("lora_b", B)):
        writer.add_tensor(f"blk.0.ffn_up.weight.{name}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MLX = saved({f"{UP}.lora_a": A.T, f"{UP}.lora_b": B.T})
MLX_CONFIG = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}
HF = {
    "config": {"architecture": "lora", "r": 4, "alpha": 8, "use_dora": False},
    "version": "adapters.1.3.0",
    "model_name": "x",
}
HF_TENSORS = {
    "encoder.layer.0.attention.self.query.loras.a.lora_A": A,
    "encoder.layer.0.attention.self.query.loras.a.lora_B": B,
}
LORALIB = saved({"layers.0.attn.c_attn.lora_A": A, "layers.0.attn.c_attn.lora_B": B})
TORCHTUNE = saved(
    {
        "layers.0.attn.q_proj.lora_a.weight": A,
        "layers.0.attn.q_proj.lora_b.weight": B,
        "layers.0.attn.q_proj.magnitude": M,
    }
)
LITGPT = saved({"transformer.h.0.attn.qkv.lora_A": A, "transformer.h.0.attn.qkv.lora_B": B})
NVLABS = saved({
    f"base_model.model.{UP}.lora_A.weight": A, f"base_model.model.{UP}.lora_B.weight": B,
    f"base_model.model.{UP}.weight_m_wdecomp.weight": M[:, None],
})  # fmt: skip
FSDP = saved(
    {f"{UP}.dora_layer.lora_A.weight": A, f"{UP}.dora_layer.lora_B.weight": B, f"{UP}.magnitude_layer.magnitude": M}
)
PROMPTS = saved({"prompt_embeddings": A})

FOREIGN: dict[str, tuple[str, Callable[[Path], Path], str]] = {  # file, its maker, what it is called
    "kohya": ("lora.safetensors", kohya, "kohya"),
    "kohya without metadata": ("lora.safetensors", kohya_without_metadata, "kohya"),
    "kohya in a folder": ("lora.safetensors", in_folder("lora.safetensors", kohya), "kohya"),
    "LyCORIS": ("loha.safetensors", lycoris, "LyCORIS"),
    "LyCORIS' DoRA": ("dora.safetensors", lycoris_dora, "LyCORIS|kohya"),
    "diffusers": ("x.safetensors", in_folder("pytorch_lora_weights.safetensors", diffusers), "diffusers"),
    "diffusers' file": ("pytorch_lora_weights.safetensors", diffusers, "diffusers"),
    "mlx": ("x.safetensors", with_config(in_folder("adapters.safetensors", MLX), MLX_CONFIG), "mlx|MLX"),
    "mlx's file": ("adapters.safetensors", MLX, "mlx|MLX"),
    "mlx without a config": ("x.safetensors", in_folder("adapters.safetensors", MLX), "mlx|MLX"),
    "AdapterHub": ("x.bin", with_config(in_folder("pytorch_adapter.bin", saved(HF_TENSORS)), HF), "hf-adapters|AdapterHub"),
    "AdapterHub's safetensors": ("x.bin", with_config(in_folder("adapter.safetensors", saved(HF_TENSORS)), HF), "hf-adapters|AdapterHub"),
    "GGUF": ("lora.gguf", gguf_adapter, "gguf"),
    "GGUF in a folder": ("lora.gguf", in_folder("lora.gguf", gguf_adapter), "gguf"),
    "loralib": ("lora.pt", LORALIB, "loralib"),
    "torchtune": ("x.pt", in_folder("adapter_0.pt", TORCHTUNE), "torchtune"),
    "torchtune's file": ("adapter_model.pt", TORCHTUNE, "torchtune"),
    "litgpt": ("x.pt", in_folder("lit_model.pth.lora", LITGPT), "litgpt|LitGPT|loralib"),
    "NVlabs' DoRA": ("x.bin", with_config(in_folder("adapter_model.bin", NVLABS), {"peft_type": "DORA", "r": 4, "lora_alpha": 8}), "nvlabs|DORA"),
    "fsdp_qlora": ("model_state_dict.safetensors", FSDP, "fsdp.qlora"),
    "a prompt": ("x.safetensors", with_config(in_folder("adapter_model.safetensors", PROMPTS), {"peft_type": "PROMPT_TUNING"}), "PROMPT_TUNING"),
}  # fmt: skip
FALSE = r"peft_type None|no adapter_model\.safetensors|name the folder|no adapter_config\.json\.|is a model|no weight file that is read|has no safetensors weights"


@pytest.fixture(params=FOREIGN)
def foreign(request, tmp_path) -> tuple[Path, str]:
    """A path, and a pattern for what it is called."""
    file, make, word = FOREIGN[request.param]
    (tmp_path / "foreign").mkdir()
    return make(tmp_path / "foreign" / file), word


def test_merge_says_what_it_is(tmp_path, base, foreign, run):
    """The tool that wrote it, not what PEFT's files would have; the command line alike."""
    path, word = foreign
    try:
        dora_convert.merge(base.path, path, tmp_path / "out")
    except DoraConvertError as error:
        text = error.text().replace(str(path), "").replace(path.name, "") + f"\n{error.hint}"
        assert re.search(word, text), text
        assert not re.search(FALSE, text), text
        code, _, err = run("merge", base.path, path, tmp_path / "out", "-q")
        assert (code, bool(re.search(word, err))) == (2, True)
    else:
        report = dora_convert.inspect(path)
        assert re.search(word, f"{report.format} {report.maker}")


def test_inspect_says_what_it_is(foreign):
    """An adapter of that format, with its tensors where they can be read; never a checkpoint."""
    path, word = foreign
    try:
        report = dora_convert.inspect(path)
    except DoraConvertError as error:
        text = error.text().replace(str(path), "").replace(path.name, "")
        assert re.search(word, text), text
        assert not re.search(FALSE, text), text
    else:
        assert report.kind == "adapter"
        assert re.search(word, f"{report.format} {report.maker} {report.method}")


def test_as_a_base_it_is_no_model(tmp_path, foreign, adapter):
    """BASE is an adapter of another tool: the error says so, and merges nothing into it."""
    path, word = foreign
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(path, adapter, tmp_path / "out")
    assert re.search(rf"{word}|is an adapter", caught.value.text().replace(str(path), ""))


def test_the_file_of_a_peft_folder_is_its_folder(tmp_path, base, adapter):
    """`adapter_model.safetensors` beside its config: merged, or its folder is named, which then is accepted."""
    file = adapter / "adapter_model.safetensors"
    try:
        dora_convert.merge(base.path, file, tmp_path / "out")
    except DoraConvertError as error:
        assert str(adapter) in f"{error.hint}"  # noqa: PT017 - one of two right answers
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert (tmp_path / "out").is_dir()


def test_a_folder_of_nothing_known(tmp_path, base):
    """No format: what is there is listed, and what an adapter would be."""
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "notes.txt").write_text("x")
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, folder, tmp_path / "out")
    assert "adapter_config.json" in caught.value.text()
