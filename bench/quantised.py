"""Time merges onto quantised bases against the dense merge of the same size.

    python bench/quantised.py FOLDER [--pairs 3] [--dora] [KIND ...]

Makes in FOLDER a Llama of 142 million weights for each kind, with random codes in the layout of the kind, an adapter of
rank 16 on all linear layers, and the dense model in bfloat16. Each pair is the dense merge and the merge onto the kind,
one after the other, as commands of their own. Prints medians of ratios: wall time, processor time, peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, LAYERS, VOCAB, RANK, GROUP = 1024, 2816, 10, 8192, 16, 128
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
LINEARS = {f"model.layers.{k}.{name}": shape for k in range(LAYERS) for name, shape in SHAPES.items()}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": LAYERS, "vocab_size": VOCAB,
    "dtype": "bfloat16", "tie_word_embeddings": True,
}  # fmt: skip
NF4 = [-1.0, -0.696, -0.525, -0.395, -0.284, -0.185, -0.091, 0.0, 0.08, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1.0]
BLOCKS = {"gguf-Q4_0": 18, "gguf-Q8_0": 34, "gguf-Q4_K": 144, "gguf-Q6_K": 210}


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64).to(torch.int32)


def some_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def scales(*shape: int) -> Tensor:
    return (torch.rand(*shape) + 0.5) * 1e-3


def dense(n: int, k: int) -> dict[str, Tensor]:
    return {"weight": (torch.randn(n, k) * 0.02).bfloat16()}


def fp8(n: int, k: int) -> dict[str, Tensor]:
    codes = torch.randn(n, k).mul_(60).clamp_(-440, 440).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales(n // 128, k // 128)}


def int8_rows(n: int, k: int) -> dict[str, Tensor]:
    return {"weight": some_bytes(n, k).view(torch.int8), "weight_scale": scales(n, 1).bfloat16()}


def int4(n: int, k: int) -> dict[str, Tensor]:
    shape = torch.tensor([n, k])
    return {"weight_packed": words(n, k // 8), "weight_scale": scales(n, k // GROUP).bfloat16(), "weight_shape": shape}


def mxfp4(n: int, k: int) -> dict[str, Tensor]:
    return {"weight_packed": some_bytes(n, k // 2), "weight_scale": torch.randint(115, 120, (n, k // 32)).byte()}


def bnb_int8(n: int, k: int) -> dict[str, Tensor]:
    return {"weight": some_bytes(n, k).view(torch.int8), "SCB": scales(n) * 100}


def nf4(n: int, k: int, *, double: bool = False) -> dict[str, Tensor]:
    said: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}
    parts = {"weight": some_bytes(n * k // 2, 1), "weight.quant_map": torch.tensor(NF4)}
    blocks = n * k // 64
    parts["weight.absmax"] = some_bytes(blocks) if double else scales(blocks) * 50
    if double:
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
        parts["weight.nested_absmax"] = scales(blocks // 256)
        parts["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
    data = json.dumps(said).encode()
    return parts | {"weight.quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(data), dtype=torch.uint8)}


def nf4_double(n: int, k: int) -> dict[str, Tensor]:
    return nf4(n, k, double=True)


def gptq(n: int, k: int) -> dict[str, Tensor]:
    order = torch.arange(k, dtype=torch.int32) // GROUP
    zeros = torch.full((k // GROUP, n // 8), 0x77777777, dtype=torch.int32)
    return {"qweight": words(k // 8, n), "qzeros": zeros, "scales": scales(k // GROUP, n).half(), "g_idx": order}


def gptq_order(n: int, k: int) -> dict[str, Tensor]:
    return {**gptq(n, k), "g_idx": torch.randperm(k).to(torch.int32) // GROUP}


def awq(n: int, k: int) -> dict[str, Tensor]:
    zeros = torch.full((k // GROUP, n // 8), 0x77777777, dtype=torch.int32)
    return {"qweight": words(k, n // 8), "qzeros": zeros, "scales": scales(k // GROUP, n).half()}


def mlx4(n: int, k: int, bits: int = 4) -> dict[str, Tensor]:
    packed = words(n, k * bits // 32).view(torch.uint32)
    return {"weight": packed, "scales": scales(n, k // 64).bfloat16(), "biases": (-8 * scales(n, k // 64)).bfloat16()}


def mlx8(n: int, k: int) -> dict[str, Tensor]:
    return mlx4(n, k, 8)


def ct(form: str, bits: int, kind: str, strategy: str, group: int | None = None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "group_size": group}
    return {
        "quant_method": "compressed-tensors", "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"],
    }  # fmt: skip


QUANTISED = "quantization_config"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp8-blocks": (fp8, {QUANTISED: {"quant_method": "fp8", "weight_block_size": [128, 128]}}),
    "ct-int8": (int8_rows, {QUANTISED: ct("int-quantized", 8, "int", "channel")}),
    "ct-int4": (int4, {QUANTISED: ct("pack-quantized", 4, "int", "group", GROUP)}),
    "ct-mxfp4": (mxfp4, {QUANTISED: ct("mxfp4-pack-quantized", 4, "float", "group", 32)}),
    "bnb-int8": (bnb_int8, {QUANTISED: {"quant_method": "bitsandbytes", "load_in_8bit": True}}),
    "bnb-nf4": (nf4, {QUANTISED: {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
    "bnb-nf4-double": (nf4_double, {QUANTISED: {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
    "gptq": (gptq, {QUANTISED: GPTQ}),
    "gptq-order": (gptq_order, {QUANTISED: {**GPTQ, "desc_act": True}}),
    "awq": (awq, {QUANTISED: {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}}),
    "mlx-4": (mlx4, {"quantization": {"group_size": 64, "bits": 4}}),
    "mlx-8": (mlx8, {"quantization": {"group_size": 64, "bits": 8}}),
}
DENSE, BACK, AGAIN = "--dequantize", "", "--requantize"
WRITTEN_BACK = ("fp8-blocks", "ct-int8", "bnb-int8", "mlx-8")
WRITTEN_AGAIN = ("ct-int4", "ct-mxfp4", "bnb-nf4", "bnb-nf4-double", "mlx-4")


def make(folder: Path, kind: str) -> Path:
    """Make a base of a kind, or the dense one."""
    path = folder / kind
    if kind.startswith("gguf"):
        return path if path.exists() else make_gguf(folder, kind)
    if path.exists():
        return path
    torch.manual_seed(0)
    maker, said = KINDS.get(kind, (dense, {}))
    tensors = {"model.embed_tokens.weight": (torch.randn(VOCAB, HIDDEN) * 0.02).bfloat16()}
    norms = [
        f"model.layers.{k}.{name}" for k in range(LAYERS) for name in ("input_layernorm", "post_attention_layernorm")
    ]
    tensors |= {f"{name}.weight": torch.ones(HIDDEN).bfloat16() for name in ("model.norm", *norms)}
    for module, shape in LINEARS.items():
        tensors |= {f"{module}.{last}": part.contiguous() for last, part in maker(*shape).items()}
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({**CONFIG, **said}))
    return path


def make_gguf(folder: Path, kind: str) -> Path:
    """Make a GGUF file with random codes; its scales are float16 of a usual size."""
    import gguf

    path, name, size = folder / kind, kind.removeprefix("gguf-"), BLOCKS[kind]
    elements = 256 if name.endswith("K") else 32
    own = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
           "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
           "mlp.down_proj": "ffn_down"}  # fmt: skip
    path.mkdir(parents=True)
    writer = gguf.GGUFWriter(path / "model.gguf", "llama")
    for add, value in (("context_length", 64), ("embedding_length", HIDDEN), ("block_count", LAYERS),
                       ("feed_forward_length", INNER), ("head_count", 16), ("head_count_kv", 16),
                       ("layer_norm_rms_eps", 1e-5)):  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    writer.add_tensor("token_embd.weight", (torch.randn(VOCAB, HIDDEN) * 0.02).numpy())
    writer.add_tensor("output_norm.weight", torch.ones(HIDDEN).numpy())
    for k in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{k}.{norm}.weight", torch.ones(HIDDEN).numpy())
        for module, (n, columns) in SHAPES.items():
            blocks = some_bytes(n * columns // elements, size)
            for at in {"Q4_K": (0, 2), "Q6_K": (208,)}.get(name, (0,)):
                blocks[:, at : at + 2] = scales(len(blocks), 1).half().view(torch.uint8)
            data = blocks.view(n, -1).numpy()
            writer.add_tensor(f"blk.{k}.{own[module]}.weight", data, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_adapter(folder: Path, *, dora: bool) -> Path:
    path = folder / ("dora" if dora else "lora")
    if path.exists():
        return path
    torch.manual_seed(1)
    tensors = {}
    for module, (n, k) in LINEARS.items():
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, k) * 0.02
        tensors[f"{key}.lora_B.weight"] = torch.randn(n, RANK) * 0.02
        if dora:
            tensors[f"{key}.lora_magnitude_vector"] = torch.rand(n) + 0.5
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "use_dora": dora, "base_model_name_or_path": "x/y",
        "target_modules": sorted({module.rpartition(".")[2] for module in LINEARS}),
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(said))
    return path


def timed(base: Path, adapter: Path, out: Path, *options: str) -> tuple[float, float, float]:
    """Run one merge; return wall time, processor time, and peak memory by the report."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "dora_convert", "merge", str(base), str(adapter), str(out), *options]
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(
        [*command, "--json", "--device", "cpu", "--undo", "none"], capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise SystemExit(done.stderr)
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return wall, used, json.loads(done.stdout)["peak_memory_bytes"] / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("kinds", nargs="*", default=[])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dora", action="store_true")
    given = parser.parse_args()
    adapter, plain = make_adapter(given.folder, dora=given.dora), make(given.folder, "dense")
    for kind in given.kinds or [*KINDS, *BLOCKS]:
        base = make(given.folder, kind)
        for way in [DENSE, *[BACK] * (kind in WRITTEN_BACK), *[AGAIN] * (kind in WRITTEN_AGAIN)]:
            ratios = []
            for _ in range(given.pairs):
                one = timed(plain, adapter, given.folder / "out")
                two = timed(base, adapter, given.folder / "out", *way.split())
                ratios.append([b / a for a, b in zip(one, two, strict=True)])
            wall, used, memory = (statistics.median(column) for column in zip(*ratios, strict=True))
            label = f"{kind} {way or 'written back'}"
            print(
                f"{label:32} time {wall:.2f}  processor {used:.2f}  memory {memory:.2f}  ({two[0]:.1f} s)", flush=True
            )


if __name__ == "__main__":
    main()
