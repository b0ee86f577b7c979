"""Make the tiny quantised models of this folder with the real tools, and the float64 truth of their weights.

    python make.py OUT             everything but MLX: torch 2.13, transformers 5.23, compressed-tensors 0.20,
                                   bitsandbytes 0.50.2, torchao 0.18
    python make.py OUT --mlx       MLX's: mlx 0.32 and numpy

Each is a Llama of one layer (gpt-oss: its experts alone). `truth.json` holds for every coded weight the sha256
of its float64 values in rows, and the first four. They come from the tools with scales in float64 where a tool
takes them; bitsandbytes' nested scales and GPTQ's words are decoded by their definitions, with numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np

HIDDEN, INNER, HEADS, VOCAB = 32, 64, 2, 16
SHAPES = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64),
}  # fmt: skip
LINEARS = {f"model.layers.0.{name}": shape for name, shape in SHAPES.items()}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_attention_heads": HEADS, "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": VOCAB,
    "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def weights(seed=0):
    """Return the dense model as numpy float32 arrays; rows have different sizes."""
    chance = np.random.default_rng(seed)
    names = {**{f"{name}.weight": shape for name, shape in LINEARS.items()}}
    names |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    out = {
        name: chance.normal(0, 0.05, shape) * np.exp(chance.normal(0, 0.5, (shape[0], 1)))
        for name, shape in names.items()
    }
    for norm in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        out[f"{norm}.weight"] = 1 + chance.normal(0, 0.1, HIDDEN)
    return {name: value.astype(np.float32) for name, value in out.items()}


def truth_of(value):
    value = np.ascontiguousarray(value, dtype=np.float64)
    return {
        "shape": list(value.shape),
        "sha256": hashlib.sha256(value.tobytes()).hexdigest(),
        "first": value.ravel()[:4].tolist(),
    }


class Folder:
    """Where models go, and what is true of them."""

    def __init__(self, out):
        self.out, self.truth = Path(out), {}
        path = self.out / "truth.json"
        if path.exists():
            self.truth = json.loads(path.read_text())

    def save(self, kind, tensors, truth, quantization, metadata=None, key="quantization_config", config=None):
        from safetensors.torch import save_file

        folder = self.out / kind
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(
            {name: value.contiguous() for name, value in tensors.items()},
            folder / "model.safetensors",
            metadata or {"format": "pt"},
        )
        (folder / "config.json").write_text(json.dumps({**(config or CONFIG), key: quantization}, indent=1) + "\n")
        self.add(kind, truth)

    def add(self, kind, truth):
        self.truth[kind] = {name: truth_of(value) for name, value in sorted(truth.items())}
        text = json.dumps(dict(sorted(self.truth.items())), indent=1)
        (self.out / "truth.json").write_text(text + "\n")


# ---- fp8


def make_fp8(folder):
    import torch

    for kind, block, scale_name, how in (
        ("fp8-blocks", (16, 16), "weight_scale_inv", "F32"),
        ("fp8-cut-off", (24, 24), "weight_scale_inv", "F32"),
        ("fp8-tensor", None, "weight_scale_inv", "F32"),
        ("fp8-rows", "rows", "weight_scale", "BF16"),
        ("fp8-ue8m0", (16, 16), "weight_scale_inv", "E8M0"),
        ("fp8-exponents", (16, 16), "scale", "U8"),
        ("fp8-mistral", None, "qscale_weight", "F32"),
    ):
        dense, tensors, truth = weights(), {}, {}
        for name, value in dense.items():
            module = name.removesuffix(".weight")
            if module not in LINEARS:
                tensors[name] = torch.tensor(value).bfloat16()
                continue
            W = torch.tensor(value)
            N, K = W.shape
            bn, bk = (N, K) if block is None else (1, K) if block == "rows" else block
            r, c = math.ceil(N / bn), math.ceil(K / bk)
            padded = torch.zeros(r * bn, c * bk)
            padded[:N, :K] = W
            s = padded.view(r, bn, c, bk).abs().amax((1, 3)) / 448
            if how != "F32":
                s = s.bfloat16().float() if how == "BF16" else torch.exp2(torch.ceil(torch.log2(s)))
            wide = s.repeat_interleave(bn, 0).repeat_interleave(bk, 1)[:N, :K]
            q = (W / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored = {
                "F32": lambda s: s, "BF16": lambda s: s.bfloat16(), "E8M0": lambda s: s.to(torch.float8_e8m0fnu),
                "U8": lambda s: (torch.log2(s) + 127).to(torch.uint8),
            }[how](s)  # fmt: skip
            tensors[name], tensors[f"{module}.{scale_name}"] = q, stored if block else stored.reshape(())
            truth[name] = (q.double() * wide.double()).numpy()
        said = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
        if isinstance(block, tuple):
            said["weight_block_size"] = list(block)
        folder.save(kind, tensors, truth, said)


def check_fp8(folder):
    """Compare with transformers' own decoding, in float32, where its blocks are right."""
    import torch
    from safetensors.torch import load_file
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors = load_file(folder.out / "fp8-blocks/model.safetensors")
    for module in LINEARS:
        q, s = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale_inv"]
        theirs = Fp8Dequantize(None)._dequantize_one(q, s).double()
        first = torch.tensor(folder.truth["fp8-blocks"][f"{module}.weight"]["first"], dtype=torch.float64)
        assert torch.allclose(theirs.flatten()[:4], first, rtol=2**-7), module


def make_fp4_packed(folder):
    """DeepSeek V4's experts: two 4-bit floats in an int8, with an exponent for 32 inputs; the other linears are fp8."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    chance, tensors, truth = torch.Generator().manual_seed(4), {}, {}
    for name, value in weights().items():
        module = name.removesuffix(".weight")
        if module not in LINEARS:
            tensors[name] = torch.tensor(value).bfloat16()
            continue
        N, K = value.shape
        packed = torch.randint(-128, 128, (N, K // 2), generator=chance, dtype=torch.int64).to(torch.int8)
        exponent = torch.randint(118, 123, (N, K // 32), generator=chance).to(torch.uint8)
        tensors[name], tensors[f"{module}.scale"] = packed, exponent.view(torch.float8_e8m0fnu)
        decoded = Fp8Dequantize(None)._dequantize_one(packed, exponent, output_dtype=torch.float32)
        truth[name] = decoded.double().numpy()
    said = {"quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": ["lm_head"]}
    folder.save("fp8-packed-fp4", tensors, truth, said)


# ---- compressed-tensors


def make_compressed(folder):
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    kinds = {
        "ct-fp8-rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "ct-fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        "ct-fp8-block": (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
        ),
        "ct-int8-rows": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        "ct-int8-tensor": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor"}),
        "ct-int8-asymmetric": (
            "int-quantized",
            {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
        ),
        "ct-int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}),
        "ct-int4-asymmetric": (
            "pack-quantized",
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False},
        ),
        "ct-int4-order": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}),
        "ct-int4-rows": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
        "ct-int8-packed": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16}),
        "ct-int3": (
            "pack-quantized",
            {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False},
        ),
        "ct-nvfp4": (
            "nvfp4-pack-quantized",
            {
                "num_bits": 4,
                "type": "float",
                "strategy": "tensor_group",
                "group_size": 16,
                "scale_dtype": "torch.float8_e4m3fn",
                "zp_dtype": "torch.float8_e4m3fn",
            },
        ),
        "ct-mxfp4": (
            "mxfp4-pack-quantized",
            {
                "num_bits": 4,
                "type": "float",
                "strategy": "group",
                "group_size": 32,
                "scale_dtype": "torch.uint8",
                "zp_dtype": "torch.uint8",
            },
        ),
        "ct-mxfp8": (
            "mxfp8-quantized",
            {
                "num_bits": 8,
                "type": "float",
                "strategy": "group",
                "group_size": 32,
                "scale_dtype": "torch.uint8",
                "zp_dtype": "torch.uint8",
            },
        ),
    }
    for kind, (form, said) in kinds.items():
        args = QuantizationArgs(**said)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor, dense, tensors, truth = BaseCompressor.get_value_from_registry(form), weights(), {}, {}
        for name, value in dense.items():
            module = name.removesuffix(".weight")
            if module not in LINEARS:
                tensors[name] = torch.tensor(value).bfloat16()
                continue
            W, local = torch.tensor(value), {}
            if form.startswith("nvfp4"):
                local["weight_global_scale"] = generate_gparam(W.min(), W.max())
            scale, zero = parameters(W, args, local.get("weight_global_scale"), calculate_qparams)
            local |= {"weight": W, "weight_scale": scale.float()}
            if not args.symmetric:
                local["weight_zero_point"] = zero
            in_order = kind == "ct-int4-order"  # 0.20 reads it and writes it no more
            if in_order:
                group = torch.randperm(W.shape[1], generator=torch.Generator().manual_seed(1)) // args.group_size
                local["weight_g_idx"] = group.int()
                local["weight_scale"] = local["weight_scale"].bfloat16().float()
                quantised = (W / local["weight_scale"][:, group]).round().clamp(-8, 7)
                from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

                packed = {
                    "weight_packed": pack_to_int32(quantised.to(torch.int8), 4),
                    "weight_shape": torch.tensor(W.shape),
                }
                packed |= {"weight_scale": local["weight_scale"], "weight_g_idx": local["weight_g_idx"]}
                exact = quantised.to(torch.int8).double() * local["weight_scale"].double()[:, group]
            else:
                packed = compressor.compress(local, scheme)
                exact = decompressed(packed, form, compressor, scheme)
            for part, tensor in packed.items():
                keep = part == "weight_global_scale" or not tensor.is_floating_point() or tensor.dtype.itemsize == 1
                tensors[f"{module}.{part}"] = (
                    tensor if keep or form == "int-quantized" or form.startswith("float") else tensor.bfloat16()
                )
            if form == "pack-quantized":  # scales in the model's dtype
                packed["weight_scale"] = packed["weight_scale"].bfloat16().float()
                exact = exact if in_order else decompressed(packed, form, compressor, scheme)
            truth[name] = exact.numpy()
        group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json()), "format": form}
        folder.save(kind, tensors, truth, {
            "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"],
            "quantization_status": "compressed", "global_compression_ratio": None, "kv_cache_scheme": None,
        })  # fmt: skip


def parameters(W, args, overall, calculate):

    N, K = W.shape
    g = args.group_size
    if args.strategy == "tensor":
        low, high = W.min().view(1), W.max().view(1)
    elif args.strategy == "channel":
        low, high = W.amin(1, keepdim=True), W.amax(1, keepdim=True)
    elif args.strategy == "block":
        bn, bk = args.block_structure
        v = W.view(N // bn, bn, K // bk, bk)
        low, high = v.amin((1, 3)), v.amax((1, 3))
    else:
        v = W.view(N, K // g, g)
        low, high = v.amin(2), v.amax(2)
    return calculate(low, high, args, global_scale=overall) if overall is not None else calculate(low, high, args)


def decompressed(packed, form, compressor, scheme):
    """Return CT's own decoding with float64 scales; by its parts where CT turns scales to float32 itself."""
    import torch

    exact = {
        name: t.double() if name in ("weight_scale", "weight_global_scale") and t.is_floating_point() else t
        for name, t in packed.items()
    }
    result = compressor.decompress(exact, scheme)["weight"]
    if result.dtype == torch.float64:
        return result
    if form.startswith(("nvfp4", "mx")):
        one = dict(packed)
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

        scale = packed["weight_scale"]
        scale = torch.exp2(scale.double() - 127) if scale.dtype == torch.uint8 else scale.double()
        if "weight_global_scale" in one:
            scale = scale / one["weight_global_scale"].double()
        if "weight" in packed:
            q = packed["weight"].double()
        else:
            raw = packed["weight_packed"]
            q = unpack_fp4_from_uint8(raw, raw.shape[0], 2 * raw.shape[1]).double()
        mine = q * scale.repeat_interleave(q.shape[1] // scale.shape[1], 1)
        assert torch.allclose(mine, result.double(), rtol=2**-7), form
        return mine
    raise AssertionError(f"{form}: {result.dtype}")


# ---- bitsandbytes, torchao: through transformers


def dense_folder(folder):
    import torch
    from safetensors.torch import save_file

    where = folder.out / "_dense"
    where.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: torch.tensor(value).bfloat16() for name, value in weights().items()},
        where / "model.safetensors",
        {"format": "pt"},
    )
    (where / "config.json").write_text(json.dumps(CONFIG))
    return where


def saved_by_transformers(folder, kind, quantization):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        dense_folder(folder), quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    shutil.rmtree(folder.out / kind, ignore_errors=True)
    model.save_pretrained(folder.out / kind)
    (folder.out / kind / "generation_config.json").unlink(missing_ok=True)
    return model


def make_bitsandbytes(folder):
    import torch
    from safetensors.torch import load_file
    from transformers import BitsAndBytesConfig

    for kind, options in {
        "bnb-nf4": {"bnb_4bit_quant_type": "nf4"},
        "bnb-nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "bnb-fp4": {"bnb_4bit_quant_type": "fp4"},
        "bnb-nf4-bf16": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    }.items():
        saved_by_transformers(
            folder, kind, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options)
        )
        folder.add(
            kind, {name: nibbles(load_file(folder.out / kind / "model.safetensors"), name) for name in coded(LINEARS)}
        )
    saved_by_transformers(folder, "bnb-int8", BitsAndBytesConfig(load_in_8bit=True))
    tensors = load_file(folder.out / "bnb-int8/model.safetensors")
    folder.add(
        "bnb-int8",
        {
            f"{m}.weight": tensors[f"{m}.weight"].double().numpy()
            * (1 / 127 * tensors[f"{m}.SCB"].double().numpy())[:, None]
            for m in LINEARS
        },
    )


def coded(modules):
    return [f"{module}.weight" for module in modules]


def nibbles(tensors, name):
    """Decode by the definition, and compare with bitsandbytes' own float32."""
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = json.loads(bytes(tensors[next(k for k in tensors if k.startswith(f"{name}.quant_state"))].numpy()))
    raw = tensors[name].contiguous().view(torch.uint8).flatten().numpy()
    codes = np.stack([raw >> 4, raw & 15], -1).ravel()
    absmax = tensors[f"{name}.absmax"].numpy()
    if f"{name}.nested_absmax" in tensors:
        nested = tensors[f"{name}.nested_absmax"].double().numpy().repeat(state["nested_blocksize"])[: len(absmax)]
        absmax = tensors[f"{name}.nested_quant_map"].double().numpy()[absmax] * nested + state["nested_offset"]
    table = tensors[f"{name}.quant_map"].double().numpy()
    value = table[codes] * absmax.astype(np.float64).repeat(state["blocksize"])[: len(codes)]
    parts = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    own = QuantState.from_dict(parts, torch.device("cpu"))
    shape, own.shape = tuple(own.shape), torch.Size([math.prod(own.shape)])  # else wrong where in % 64 is not 0
    own.dtype = torch.float32
    theirs = dequantize_4bit(tensors[name].contiguous().view(torch.uint8), own).flatten().double().numpy()
    assert np.allclose(theirs, value, rtol=1e-6, atol=1e-9), name
    return value.reshape(shape)


def make_torchao(folder):
    import torch
    import torchao.quantization as ao
    from safetensors.torch import load_file
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    for kind, config in {
        "torchao-int8": ao.Int8WeightOnlyConfig(version=2),
        "torchao-fp8": ao.Float8WeightOnlyConfig(),
        "torchao-int4": ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
        "torchao-int4-asymmetric": ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,
            granularity=PerGroup(16),
            mapping_type=__import__("torchao.quantization.quant_primitives", fromlist=["x"]).MappingType.ASYMMETRIC,
        ),
    }.items():
        model = saved_by_transformers(folder, kind, TorchAoConfig(config))
        tensors, truth = load_file(folder.out / kind / "model.safetensors"), {}
        for module in LINEARS:
            q, s = tensors[f"{module}._weight_qdata"].double(), tensors[f"{module}._weight_scale"].double()
            z = tensors.get(f"{module}._weight_zero_point", torch.zeros_like(s)).double()
            g = q.shape[1] // s.shape[1]
            value = (q - z.repeat_interleave(g, 1)) * s.repeat_interleave(g, 1)
            theirs = model.get_submodule(module).weight.dequantize().double()
            assert torch.allclose(theirs, value, rtol=2**-7), kind
            truth[f"{module}.weight"] = value.numpy()
        folder.add(kind, truth)


# ---- GPTQ, AWQ: packed by their definitions


def packed(q, bits, axis):
    """Return codes as 32-bit words along an axis, low bits first."""
    q = np.moveaxis(q.astype(np.uint64), axis, -1)
    bit = ((q[..., None] >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)).reshape(*q.shape[:-1], -1, 32)
    words = (bit << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))


def make_gptq(folder):
    import torch

    for kind, bits, version, order in (
        ("gptq", 4, "gptq", False), ("gptq-order", 4, "gptq", True), ("gptq-v2", 4, "gptq_v2", True),
        ("gptq-2", 2, "gptq", False), ("gptq-8", 8, "gptq", False),
    ):  # fmt: skip
        chance, tensors, truth, group = np.random.default_rng(5), {}, {}, 16
        for name, value in weights().items():
            module = name.removesuffix(".weight")
            if module not in LINEARS:
                tensors[name] = torch.tensor(value).half()
                continue
            W, top = value.T.astype(np.float64), 2**bits - 1  # (K, N)
            K = len(W)
            g = np.arange(K) // group
            g = chance.permutation(g) if order else g
            low = np.stack([W[g == k].min(0) for k in range(K // group)])
            high = np.stack([W[g == k].max(0) for k in range(K // group)])
            s = ((high - low) / top).astype(np.float16)
            z = np.clip(np.round(-low / s.astype(np.float64)), 1, top)
            q = np.clip(np.round(W / s.astype(np.float64)[g]) + z[g], 0, top)
            truth[name] = (s.astype(np.float64)[g] * (q - z[g])).T
            tensors[f"{module}.qweight"] = torch.tensor(packed(q, bits, 0))
            tensors[f"{module}.qzeros"] = torch.tensor(packed(z - (version == "gptq"), bits, 1))
            tensors[f"{module}.scales"] = torch.tensor(s)
            tensors[f"{module}.g_idx"] = torch.tensor(g.astype(np.int32))
        folder.save(kind, tensors, truth, {
            "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": False, "checkpoint_format": version,
        }, config={**CONFIG, "dtype": "float16"})  # fmt: skip


def make_awq(folder):
    import torch
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    order, group, tensors, truth = [0, 2, 4, 6, 1, 3, 5, 7], 16, {}, {}
    converter = AutoAWQConverter(group_size=group)
    for name, value in weights().items():
        module = name.removesuffix(".weight")
        if module not in LINEARS:
            tensors[name] = torch.tensor(value).half()
            continue
        W = value.T.astype(np.float64)
        K, N = W.shape
        v = W.reshape(K // group, group, N)
        s = ((v.max(1) - v.min(1)) / 15).astype(np.float16)
        z = np.clip(np.round(-v.min(1) / s.astype(np.float64)), 0, 15)
        wide = s.astype(np.float64).repeat(group, 0)
        q = np.clip(np.round(W / wide) + z.repeat(group, 0), 0, 15)
        parts = {
            "qweight": packed(q.reshape(K, N // 8, 8)[..., order].reshape(K, N), 4, 1),
            "qzeros": packed(z.reshape(-1, N // 8, 8)[..., order].reshape(-1, N), 4, 1), "scales": s,
        }  # fmt: skip
        parts = {k: torch.tensor(v) for k, v in parts.items()}
        tensors |= {f"{module}.{k}": v for k, v in parts.items()}
        truth[name] = ((q - z.repeat(group, 0)) * wide).T
        weight, scale, zero = converter._convert_gemm_module(parts["qweight"], parts["scales"], parts["qzeros"])
        theirs = (weight.double() - zero.double().repeat_interleave(group, 1)) * scale.double().repeat_interleave(
            group, 1
        )
        assert np.array_equal(theirs.numpy(), truth[name]), name
    said = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    folder.save("awq", tensors, truth, said, config={**CONFIG, "dtype": "float16"})


# ---- gpt-oss, modelopt


def make_gpt_oss(folder):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator, E, tensors, truth = torch.Generator().manual_seed(3), 2, {}, {}
    for name, (out, inn) in {"gate_up_proj": (48, 32), "down_proj": (32, 64)}.items():
        P = f"model.layers.0.mlp.experts.{name}"
        blocks = torch.randint(0, 256, (E, out, inn // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(115, 125, (E, out, inn // 32), generator=generator, dtype=torch.uint8)
        tensors |= {f"{P}_blocks": blocks, f"{P}_scales": scales, f"{P}_bias": torch.zeros(E, out).bfloat16()}
        truth[P] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float64).numpy()
    for name, shape in {"q_proj": (32, 32), "v_proj": (16, 32)}.items():
        tensors[f"model.layers.0.self_attn.{name}.weight"] = torch.randn(shape, generator=generator).bfloat16()
    tensors["model.embed_tokens.weight"] = torch.randn(16, 32, generator=generator).bfloat16()
    config = {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "num_hidden_layers": 1,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    folder.save("gpt-oss", tensors, truth, said, config=config)


def make_modelopt(folder):
    import torch

    tensors, truth = {}, {}
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    for name, value in weights().items():
        module = name.removesuffix(".weight")
        if module not in LINEARS:
            tensors[name] = torch.tensor(value).bfloat16()
            continue
        W = torch.tensor(value).double()
        overall = (W.abs().max() / (6 * 448)).float()
        local = (W.view(W.shape[0], -1, 16).abs().amax(2) / 6 / overall).to(torch.float8_e4m3fn)
        wide = (local.double() * overall.double()).repeat_interleave(16, 1)
        codes = ((W / wide.clamp(min=1e-12))[..., None] - values).abs().argmin(-1).to(torch.uint8)
        tensors[name] = codes[:, ::2] | codes[:, 1::2] << 4
        tensors[f"{module}.weight_scale"], tensors[f"{module}.weight_scale_2"] = local, overall
        tensors[f"{module}.input_scale"] = torch.tensor(1.0)
        truth[name] = (values[codes.long()] * wide).numpy()
    folder.save(
        "modelopt-nvfp4", tensors, truth, {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    )


# ---- MLX


def make_mlx(folder):
    import mlx.core as mx

    for kind, mode, bits, group in (
        ("mlx-4", "affine", 4, 32), ("mlx-8", "affine", 8, 32), ("mlx-3", "affine", 3, 32), ("mlx-6", "affine", 6, 32),
        ("mlx-mxfp4", "mxfp4", 4, 32), ("mlx-mxfp8", "mxfp8", 8, 32), ("mlx-nvfp4", "nvfp4", 4, 16),
    ):  # fmt: skip
        tensors, truth = {}, {}
        for name, value in weights().items():
            W = mx.array(value)
            if value.ndim == 1:
                tensors[name] = W.astype(mx.bfloat16)
                continue
            parts = mx.quantize(
                W.astype(mx.bfloat16) if mode == "affine" else W, group_size=group, bits=bits, mode=mode
            )
            for part, tensor in zip(("weight", "scales", "biases"), parts, strict=False):
                tensors[f"{name.removesuffix('.weight')}.{part}"] = tensor
            truth[name] = exact_mlx(mx, parts, mode, bits, group)
        out = folder.out / kind
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        mx.save_safetensors(str(out / "model.safetensors"), tensors, metadata={"format": "mlx"})
        said = {"group_size": group, "bits": bits, **({"mode": mode} if mode != "affine" else {})}
        (out / "config.json").write_text(
            json.dumps({**CONFIG, "quantization": said, "quantization_config": said}, indent=1) + "\n"
        )
        folder.add(kind, truth)


def exact_mlx(mx, parts, mode, bits, group):
    """Return MLX's codes, from its own decoding with scales of 1, times the scales in float64."""
    q, s = parts[0], parts[1]
    if mode == "affine":
        one, none = mx.ones(s.shape, mx.float32), mx.zeros(s.shape, mx.float32)
        codes = np.array(mx.dequantize(q, one, none, group_size=group, bits=bits)).astype(np.float64)
        wide = [np.array(p.astype(mx.float32)).astype(np.float64).repeat(group, 1) for p in parts[1:]]
        value = codes * wide[0] + wide[1]
    else:
        unit = mx.full(s.shape, 127 if mode != "nvfp4" else 0x38, dtype=mx.uint8)
        codes = np.array(mx.dequantize(q, unit, group_size=group, bits=bits, mode=mode, dtype=mx.float32)).astype(
            np.float64
        )
        raw = np.array(s)
        scale = np.exp2(raw.astype(np.float64) - 127) if mode != "nvfp4" else e4m3(raw)
        value = codes * scale.repeat(group, 1)
    theirs = mx.dequantize(*parts, group_size=group, bits=bits, mode=mode)
    assert np.allclose(np.array(theirs.astype(mx.float32)), value, rtol=2**-6, atol=1e-3), mode
    return value


def e4m3(raw):
    exponent, mantissa = (raw >> 3 & 15).astype(int), (raw & 7).astype(np.float64)
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10)) * np.where(
        raw >> 7, -1, 1
    )


MAKERS = {
    "fp8": make_fp8, "fp4-packed": make_fp4_packed, "check": check_fp8, "compressed": make_compressed, "bitsandbytes": make_bitsandbytes, "torchao": make_torchao,
    "gptq": make_gptq, "awq": make_awq, "gpt-oss": make_gpt_oss, "modelopt": make_modelopt,
}  # fmt: skip

if __name__ == "__main__":
    folder = Folder(sys.argv[1])
    folder.out.mkdir(parents=True, exist_ok=True)
    chosen = sys.argv[2:]
    for name, maker in ({"mlx": make_mlx} if "--mlx" in chosen else MAKERS).items():
        if not chosen or chosen == ["--mlx"] or name in chosen:
            maker(folder)
    shutil.rmtree(folder.out / "_dense", ignore_errors=True)
