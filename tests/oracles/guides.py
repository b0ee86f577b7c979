"""Run every command of docs/guides from start to end with a real model and the programs that the guides name.

    python tests/oracles/guides.py BASE ADAPTER LLAMA_CPP [GUIDE...]

BASE is a language model, ADAPTER a DoRA of PEFT, LLAMA_CPP a folder with convert_hf_to_gguf.py. Each guide gets a
folder of its own with `base`, `adapter`, `lora`, `tuned`, `outputs/checkpoint-500`, `pipeline` and `style`. Its blocks
are run in their order, line by line. A line whose program is not installed is printed as not run, with the reason, and
counted at the end.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
GUIDES = ROOT / "docs/guides"
NEVER = {
    "pip download dora-convert": "needs a release on PyPI",
    "pip install --no-index": "needs the folder of the line before",
    "vllm serve": "a server, and it needs a GPU",
    "python -m sglang": "a server, and it needs a GPU",
}
"""Beginnings of lines that are not run even if their program is installed."""
LONGEST = 300


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield language and text of each block that is run."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language in {"console", "bash"}:
            yield from (("bash", line) for line in block.splitlines())
        elif language in {"python", "py"}:
            yield "python", block
        elif language == "sh":
            yield from (("cluster", line) for line in block.splitlines())


def missing(line: str) -> str | None:
    """Return the reason for which a line of a shell is not run."""
    for start, reason in NEVER.items():
        if line.startswith(start):
            return reason
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if "merged-q4.gguf" in words and not shutil.which("llama-quantize"):
        return "llama-quantize is not installed"
    return None if shutil.which(words[0]) else f"{words[0]} is not installed"


LLAMA = """#!{python}
import argparse, json
import xllamacpp
parser = argparse.ArgumentParser()
parser.add_argument("-m"), parser.add_argument("-p"), parser.add_argument("--lora")
words = parser.parse_args()
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = words.m, 256, 1
if words.lora:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = words.lora, 1.0
    parameters.lora_adapters = [adapter]
answer = xllamacpp.Server(parameters).handle_completions({{"prompt": words.p, "max_tokens": 8, "temperature": 0}})
answer = json.loads(answer) if isinstance(answer, str) else answer
print(answer["choices"][0]["text"])
"""
"""A `llama-cli` made of xllamacpp, if none is installed: it runs a model, with or without a LoRA."""


def add_llama(folder: Path) -> None:
    """Put a `llama-cli` on PATH if none is there and xllamacpp is."""
    if not shutil.which("llama-cli") and find_spec("xllamacpp"):
        script = folder / "llama-cli"
        script.write_text(LLAMA.format(python=sys.executable))
        script.chmod(0o755)
        os.environ["PATH"] += f"{os.pathsep}{folder}"
        sys.stdout.write("llama-cli is not installed: xllamacpp takes its place\n")


def fill(place: Path, base: str, adapter: str, llama_cpp: str) -> None:
    """Make the inputs that the guides name."""
    (place / "base").symlink_to(Path(base).resolve())
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    kinds = {"adapter": {}, "lora": {"use_dora": False}, "outputs/checkpoint-500": {}}
    for name, changes in kinds.items():
        shutil.copytree(adapter, place / name)
        named = "unsloth/base-bnb-4bit" if "/" in name else "base"
        written = {**config, **changes, "base_model_name_or_path": named}
        (place / name / "adapter_config.json").write_text(json.dumps(written))
    drop_magnitudes(place / "lora")
    small_pipeline(place)
    (place / "ComfyUI/models/diffusion_models").mkdir(parents=True)
    for script in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        real = str(Path(llama_cpp).resolve() / script)  # it looks for its own gguf-py beside itself
        code = f"import os, sys\n\nos.execv(sys.executable, [sys.executable, {real!r}, *sys.argv[1:]])\n"
        (place / script).write_text(code)
    subprocess.run(["dora-convert", "merge", "base", "lora", "tuned", "-q"], cwd=place, check=True)


def drop_magnitudes(folder: Path) -> None:
    """Make a LoRA of a DoRA."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "magnitude" not in name}
    save_file(kept, file, {"format": "pt"})


def small_pipeline(place: Path) -> None:
    """Write a small U-Net of diffusers, and a DoRA of it."""
    import peft
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    sizes = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 16}
    unet = UNet2DConditionModel(**sizes, **blocks, norm_num_groups=8, attention_head_dim=4)
    unet.save_pretrained(place / "pipeline/unet")
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], use_dora=True, init_lora_weights=False)
    peft.get_peft_model(unet, config).save_pretrained(place / "style")


def run(guide: Path, place: Path) -> tuple[int, list[str], list[str]]:
    """Run a guide's blocks; return the number that ran, failures, and lines that were not run."""
    done, failed, left = 0, [], []
    for language, text in blocks(guide.read_text(encoding="utf-8")):
        reason = "needs a cluster" if language == "cluster" else missing(text) if language == "bash" else None
        if reason:
            left.append(f"{text}  ({reason})")
            continue
        words = ["bash", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        finished = subprocess.run(
            words, cwd=place, capture_output=True, text=True, check=False, timeout=LONGEST, stdin=subprocess.DEVNULL
        )
        done += 1
        if finished.returncode:
            failed.append(f"{text}\n{finished.stdout[-400:]}{finished.stderr[-1200:]}")
    return done, failed, left


def main(base: str, adapter: str, llama_cpp: str, *names: str) -> int:
    """Run the guides, and print each one's result; return 1 if a line failed."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["TQDM_DISABLE"] = "1"
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        add_llama(Path(folder))
        first = Path(folder) / "inputs"
        first.mkdir()
        fill(first, base, adapter, llama_cpp)
        for guide in sorted(GUIDES.glob("*.md")):
            if names and guide.stem not in names:
                continue
            place = Path(folder) / guide.stem
            shutil.copytree(first, place, symlinks=True)
            done, failed, left = run(guide, place)
            shutil.rmtree(place)
            total += len(failed)
            sys.stdout.write(f"{guide.name}: {done} ran, {len(failed)} failed, {len(left)} not run\n")
            for line in (*(f"FAILED {text}" for text in failed), *(f"not run: {text}" for text in left)):
                sys.stdout.write(f"  {line}\n")
            sys.stdout.flush()
    return min(1, total)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
