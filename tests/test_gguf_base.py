"""GGUF models as a base: every type, names, order of rows, config, tokenizer, and what is refused."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert import RefError, UnsupportedError, UsageError
from dora_convert.codecs.detect import find_coded
from dora_convert.codecs.gguf_blocks import KINDS
from dora_convert.parity.coded_values import CodedValues
from dora_convert.storage.reader import Reader

from . import gguf_bases
from .gguf_bases import HALVES, HEADS, in_metas_order, llama, pairs_of, write_file
from .hubserver import Hub, run
from .quantised_bases import ALPHA, RANK, decoded, opened, rounded

QUICK = {"device": "cpu", "workers": 1}
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def adapter_for(path, values, *, dora):
    """Write an adapter on a permuted and another module; return the merge's float64 result for all weights."""
    chance, tensors, merged = torch.Generator().manual_seed(7), {}, dict(values)
    for module in MODULES:
        W = values[f"{module}.weight"]
        A, B = (torch.randn(*shape, generator=chance) * 0.1 for shape in ((RANK, W.shape[1]), (W.shape[0], RANK)))
        key, V = f"base_model.model.{module}", W + ALPHA / RANK * B.double() @ A.double()
        tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        if dora:
            m = (W.norm(dim=1) * (1 + 0.1 * torch.randn(len(W), generator=chance))).float()
            tensors[f"{key}.lora_magnitude_vector"] = m
            V = V * (m.double() / V.norm(dim=1))[:, None]
        merged[f"{module}.weight"] = V
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "use_dora": dora,
        "target_modules": ["q_proj", "down_proj"],
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return merged


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_values_are_those_of_the_gguf_package(kind, tmp_path):
    """Blocks decode to the package's values up to its float32, in pieces of any height, and so does the second decoder."""
    values = llama(tmp_path / "model.gguf", kind)
    coded = find_coded(opened(tmp_path / "model.gguf"))
    assert coded.keys() == values.keys()
    for name, tensor in coded.items():
        rows, wanted = tensor.matrix[0], values[name]
        got = decoded(tensor, 0, rows)
        assert (got - wanted).abs().max() <= 2.0**-22 * wanted.abs().max() * 4, name
        pieces = [decoded(tensor, k, min(k + 7, rows)) for k in range(0, rows, 7)]
        assert torch.equal(torch.cat(pieces), got)
        few = [0, rows // 3, rows - 1]
        assert torch.equal(CodedValues(tensor, Reader()).rows(few), got[few])


def test_every_readable_type_has_a_test():
    assert HALVES.keys() == KINDS.keys()


@pytest.mark.parametrize(("kind", "dora"), [("Q4_K", True), ("Q8_0", False), ("F16", True)])
def test_dequantize_is_exact(kind, dora, tmp_path):
    """OUT is a checkpoint of the Hub, whose weights are the float64 result rounded once; verify agrees."""
    values = llama(tmp_path / "model.gguf", kind)
    wanted = adapter_for(tmp_path / "adapter", values, dora=dora)
    report = dora_convert.merge(
        tmp_path / "model.gguf", tmp_path / "adapter", tmp_path / "out", dequantize=True, **QUICK
    )
    got = load_file(tmp_path / "out/model.safetensors")
    assert got.keys() == wanted.keys()
    dtype = torch.float16 if kind == "F16" else torch.bfloat16
    for name, value in wanted.items():
        off = got[name] != rounded(value, dtype)
        assert off.sum() <= off.numel() / 20_000, name  # the package's own float32
    assert report.verified.checked > report.verified.wrong_elements == 0
    verdict = dora_convert.verify(tmp_path / "model.gguf", tmp_path / "adapter", tmp_path / "out", device="cpu")
    assert verdict.verdict == "agree", verdict.problems
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert (config["architectures"], config["rms_norm_eps"], config["head_dim"]) == (["LlamaForCausalLM"], 1e-5, 64)
    assert config["tie_word_embeddings"] is False
    assert "--dequantize" in (tmp_path / "out/README.md").read_text()


def test_refusals_name_the_way_out(tmp_path):
    """Codes are never written back, no undo record is kept, and unmerge says that it cannot make a GGUF file."""
    base, adapter, out = tmp_path / "model.gguf", tmp_path / "adapter", tmp_path / "out"
    adapter_for(adapter, llama(base, "Q4_0"), dora=False)
    for choice in ({}, {"requantize": True}, {"dequantize_touched": True}):
        with pytest.raises(UnsupportedError) as refused:
            dora_convert.merge(base, adapter, out, **choice, **QUICK)
        assert "dequantize=True writes" in str(refused.value.hint)
    with pytest.raises(UsageError, match="cannot be given back"):
        dora_convert.merge(base, adapter, out, dequantize=True, undo="norms", **QUICK)
    with pytest.raises(UsageError, match="does not go with"):
        dora_convert.merge(base, adapter, in_place=True, allow_lossy=True, dequantize=True, **QUICK)
    dora_convert.merge(base, adapter, out, dequantize=True, **QUICK)
    with pytest.raises(UnsupportedError, match="no unmerge gives back"):
        dora_convert.unmerge(out, adapter, tmp_path / "back", device="cpu")


def test_what_is_not_read_is_refused_by_name(tmp_path):
    write_file(tmp_path / "bert.gguf", "bert", {"token_embd.weight": np.zeros((4, 32), np.float32)})
    with pytest.raises(UnsupportedError, match="GGUF file of bert"):
        opened(tmp_path / "bert.gguf")
    tensors = {"token_embd.weight": (np.zeros((4, 66), np.uint8), "IQ2_XXS")}
    write_file(tmp_path / "iq.gguf", "llama", tensors)
    with pytest.raises(UnsupportedError, match="IQ2_XXS"):
        find_coded(opened(tmp_path / "iq.gguf"))
    write_file(
        tmp_path / "odd.gguf",
        "llama",
        {"token_embd.weight": np.zeros((4, 32), np.float32), "blk.0.odd.weight": np.zeros(4, np.float32)},
    )
    with pytest.raises(UnsupportedError) as refused:
        find_coded(opened(tmp_path / "odd.gguf"))
    assert [fault.what for fault in refused.value.faults] == ["blk.0.odd.weight"]


def test_a_folder_and_split_files(tmp_path):
    """Parts of a model are one checkpoint; files beside them are copied, and their config counts."""
    folder = tmp_path / "folder"
    folder.mkdir()
    values = llama(folder / "m.gguf", "Q4_1", split=6)
    assert len(list(folder.glob("m-*-of-00002.gguf"))) == 2
    wanted = adapter_for(tmp_path / "adapter", values, dora=False)
    (folder / "tokenizer.model").write_bytes(b"spm")
    report = dora_convert.merge(
        folder, tmp_path / "adapter", tmp_path / "out", dequantize=True, dtype="float32", **QUICK
    )
    table = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert table.keys() == wanted.keys()
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"spm"
    assert report.verified.wrong_elements == 0
    (folder / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(RefError, match="Several GGUF models"):
        opened(folder)
    (folder / "other.gguf").unlink()
    (folder / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(RefError, match="lacks m-00002"):
        opened(folder)


def test_files_on_the_hub(tmp_path):
    """A file of a repo, or the only model of one, is downloaded with all its parts; of several none is chosen."""
    repo = tmp_path / "hub/quants"
    repo.mkdir(parents=True)
    adapter_for(tmp_path / "adapter", llama(repo / "m.gguf", "Q8_0", split=6), dora=False)
    (repo / "README.md").write_text("# quants")
    hub = Hub({"org/quants": repo}, tmp_path / "hub")
    try:
        base = "hf://org/quants/m-00001-of-00002.gguf"
        words = [tmp_path / "adapter", tmp_path / "a", "--dequantize"]
        done = run(hub, tmp_path / "cache", "merge", base, *words, HF_TOKEN="")
        assert done.returncode == 0, done.stderr
        again = run(
            hub, tmp_path / "cache", "merge", "org/quants", words[0], tmp_path / "b", "--dequantize", HF_TOKEN=""
        )
        assert again.returncode == 0, again.stderr
        names = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
        for name in names:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        llama(repo / "other.gguf", "Q4_0")
        refused = run(
            hub, tmp_path / "new", "merge", "org/quants", words[0], tmp_path / "c", "--dequantize", HF_TOKEN=""
        )
        assert refused.returncode == 2
        assert "Several GGUF models" in refused.stderr
    finally:
        hub.shutdown()
        hub.server_close()


def test_other_verbs_read_it(tmp_path):
    """inspect names the types and counts dense weights; extract and to-lora take the dense values."""
    base = tmp_path / "model.gguf"
    values = llama(base, "Q6_K")
    adapter_for(tmp_path / "adapter", values, dora=False)
    report = dora_convert.inspect(base).to_dict()
    assert report["format"] == "GGUF"
    assert [each["loader"] for each in report["loaders"] if each["verdict"] == "no"] == ["MLX"]
    assert report["dense_parameters"] == sum(value.numel() for value in values.values())
    assert {title.partition(",")[0] for title in report["coded"]} == {"GGUF Q6_K", "GGUF F32"}
    dora_convert.merge(base, tmp_path / "adapter", tmp_path / "out", dequantize=True, dtype="float32", **QUICK)
    found = dora_convert.extract(base, tmp_path / "out", tmp_path / "again", rank=RANK, kind="lora", device="cpu")
    assert found.relative_error < 1e-3
    assert {module.name for module in found.modules} == {f"{module}.weight" for module in MODULES}


def test_biases_norms_and_experts(tmp_path):
    """Gemma's norms have one added on disk; biases of q are permuted; experts are tensors of their own."""

    def gemma(writer):
        pairs_of(writer)
        writer.add_sliding_window(32)

    norm = np.linspace(0.5, 1.5, gguf_bases.HIDDEN, dtype=np.float32)
    embedding = {"token_embd.weight": np.ones((4, gguf_bases.HIDDEN), np.float32)}
    base = opened(write_file(tmp_path / "g.gguf", "gemma2", {**embedding, "blk.0.ffn_norm.weight": norm}, pairs=gemma))
    name, tensor = "model.layers.0.pre_feedforward_layernorm.weight", find_coded(base)
    assert torch.equal(decoded(tensor[name], 0, 1)[0], torch.from_numpy(norm).double() - 1)
    assert (base.config["sliding_window"], base.config["tie_word_embeddings"]) == (32, True)

    bias = np.arange(gguf_bases.HIDDEN, dtype=np.float32)
    path = write_file(tmp_path / "b.gguf", "llama", {**embedding, "blk.0.attn_q.bias": in_metas_order(bias, HEADS)})
    tensor = find_coded(opened(path))["model.layers.0.self_attn.q_proj.bias"]
    for got in (decoded(tensor, 0, 1), CodedValues(tensor, Reader()).rows([0])):
        assert torch.equal(got[0], torch.from_numpy(bias).double())

    def moe(writer):
        pairs_of(writer)
        writer.add_expert_count(3)

    stacked = np.arange(3 * 2 * 32, dtype=np.float32).reshape(3, 2, 32)
    base = opened(
        write_file(tmp_path / "e.gguf", "qwen3moe", {**embedding, "blk.0.ffn_up_exps.weight": stacked}, pairs=moe)
    )
    tensor = find_coded(base)["model.layers.0.mlp.experts.2.up_proj.weight"]
    assert torch.equal(decoded(tensor, 0, 2), torch.from_numpy(stacked[2]).double())


def test_gemma_and_starcoder2(tmp_path):
    """Gemma's second norm has llama's name, and one added; StarCoder2 has biases, and norms of another kind."""

    def starcoder2(writer):
        pairs_of(writer)
        writer.add_layer_norm_eps(1e-6)

    norm, embedding = np.full(4, 1.5, np.float32), {"token_embd.weight": np.ones((4, 4), np.float32)}
    base = opened(write_file(tmp_path / "g.gguf", "gemma", {**embedding, "blk.0.ffn_norm.weight": norm}))
    tensor = find_coded(base)["model.layers.0.post_attention_layernorm.weight"]
    assert decoded(tensor, 0, 1).tolist() == [[0.5] * 4]
    assert base.config["architectures"] == ["GemmaForCausalLM"]
    tensors = {**embedding, "blk.0.ffn_up.bias": norm, "output_norm.bias": norm}
    base = opened(write_file(tmp_path / "s.gguf", "starcoder2", tensors, pairs=starcoder2))
    coded = find_coded(base)
    assert coded.keys() == {"model.embed_tokens.weight", "model.layers.0.mlp.c_fc.bias", "model.norm.bias"}
    assert decoded(coded["model.norm.bias"], 0, 1).tolist() == [[1.5] * 4]
    assert (base.config["model_type"], base.config["norm_epsilon"]) == ("starcoder2", 1e-6)


def test_scaled_rotary_embeddings(tmp_path):
    """Llama 3.1's factors become its rule in the config; factors of another rule are refused."""
    inverse = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    wavelength = 2 * np.pi / inverse
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)

    pairs = partial(pairs_of, theta=500000.0)
    embedding = {"token_embd.weight": np.ones((4, 256), np.float32)}
    path = write_file(tmp_path / "a.gguf", "llama", {**embedding, "rope_freqs.weight": factors}, pairs=pairs)
    said = opened(path).config["rope_scaling"]
    assert said == {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    path = write_file(tmp_path / "b.gguf", "llama", {**embedding, "rope_freqs.weight": factors**2}, pairs=pairs)
    with pytest.raises(UnsupportedError, match="rotary"):
        opened(path)


def test_fitting_verbs(tmp_path):
    """from-lora, to-lora, analyze and inspect of an adapter take the dense values, without a word of dequantising."""
    base = tmp_path / "model.gguf"
    values = llama(base, "Q5_K")
    adapter_for(tmp_path / "lora", values, dora=False)
    adapter_for(tmp_path / "dora", values, dora=True)
    made = dora_convert.from_lora(base, tmp_path / "lora", tmp_path / "a", device="cpu")
    assert {module.name.removesuffix(".weight") for module in made.modules} == set(MODULES)
    assert dora_convert.to_lora(base, tmp_path / "dora", tmp_path / "b", rank=64, device="cpu").relative_error < 0.9
    assert len(dora_convert.analyze(base, tmp_path / "lora", device="cpu").points) == len(MODULES)
    assert "does not fit" not in str(dora_convert.inspect(tmp_path / "lora", base=base).to_dict())
