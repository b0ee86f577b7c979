"""Write GGUF adapters as llama.cpp's own converter does, tensor by tensor, for every architecture that we name.

    TOOLS/python tests/oracles/gguf_lora.py DORA_CONVERT LLAMA_CPP [MODEL_TYPE...]

TOOLS is an environment with torch, transformers, peft and gguf. LLAMA_CPP is its source, as in llama-cpp-python's
sdist (vendor/llama.cpp). For each `model_type` a small model gets a LoRA on all linear layers, and on its embedding
if the converter takes that. Both programs convert the same PEFT folder: names, pairs and bytes must be the same. Our
file, read back, must merge to the same weights as PEFT's folder.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

NAMES = runpy.run_path(str(Path(__file__).parents[2] / "dora_convert/formats/gguf/names.py"))

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "moe_intermediate_size": 16,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 8,
}  # fmt: skip
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Models whose experts are one parameter, which the converter does not take: attention alone gets a LoRA."""
PAIRS = ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
torch.manual_seed(3)


def make(kind: str, folder: Path) -> None:
    """Write a small model, and a PEFT adapter of it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(kind).to_dict()
    config = AutoConfig.for_model(kind, **{name: size for name, size in SIZES.items() if name in known})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(folder / "base")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if kind in EXPERTS else "all-linear"
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=10, target_modules=targets))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    peft.save_pretrained(folder / "peft")


def run(*words: object) -> str:
    """Run a command; return the last line that it says if it fails, else an empty text."""
    done = subprocess.run([*map(str, words)], check=False, capture_output=True, text=True)
    return (done.stderr.strip() or "failed").splitlines()[-1] if done.returncode else ""


def content(file: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Return the pairs and the tensors of a GGUF file."""
    reader = gguf.GGUFReader(file)
    return {key: reader.fields[key].contents() for key in PAIRS}, {t.name: torch.tensor(t.data) for t in reader.tensors}


def verdict(kind: str, folder: Path, llama_cpp: Path) -> str:
    """Return why our file of a model is not llama.cpp's, or does not merge as PEFT's; "" if all is well."""
    make(kind, folder)
    base, adapter = folder / "base", folder / "peft"
    script = llama_cpp / "convert_lora_to_gguf.py"
    real = (sys.executable, script, "--base", base, "--outtype", "f32", "--outfile", folder / "real.gguf", adapter)
    own = (sys.argv[1], "convert", adapter, folder / "own", "--to", "gguf", "--base", base, "--quiet")
    if (wrong := run(*real)) or (wrong := run(*own)):
        return wrong
    (pairs, tensors), (wanted_pairs, wanted) = content(folder / "own/adapter.gguf"), content(folder / "real.gguf")
    if pairs != wanted_pairs or tensors.keys() != wanted.keys():
        return f"{pairs} for {wanted_pairs}; {sorted(tensors.keys() ^ wanted.keys())[:4]}"
    if odd := [name for name in tensors if not torch.equal(tensors[name], wanted[name])]:
        return f"{len(odd)} tensors differ, such as {odd[0]}"
    for name, each in (("one", adapter), ("two", folder / "own")):
        if wrong := run(sys.argv[1], "merge", base, each, folder / name, "--quiet"):
            return wrong
    one, two = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    return "" if all(torch.equal(one[name], two[name]) for name in one) else "read back, it merges to other weights"


def main() -> None:
    """Compare every architecture; exit with 1 if one is off."""
    wrong = 0
    for kind in sys.argv[3:] or NAMES["ARCHITECTURES"]:
        with tempfile.TemporaryDirectory() as folder:
            why = verdict(kind, Path(folder), Path(sys.argv[2]))
        wrong += bool(why)
        sys.stdout.write(f"{'OFF' if why else 'ok '} {kind} {why[:300]}\n")
        sys.stdout.flush()
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
