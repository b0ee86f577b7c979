"""Count the elements of a merge that are not the rounded float64 result, for several tools and options.

    python precision.py BASE ADAPTER

BASE is a bfloat16 or float16 checkpoint that transformers loads. The script computes each merged weight in
float64, and rounds the weight by comparing neighbours.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dora_convert

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.toy import rounded


def exact(base: str, adapter: str) -> dict[str, torch.Tensor]:
    """Return the weights of PEFT's merge of a float64 model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    merged = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double().merge_and_unload()
    return {name: weight for name, weight in merged.state_dict().items() if weight.dim() == 2}


def by_peft(base: str, adapter: str, *, safe: bool, half: bool) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=not half)
    return (model.to(model.dtype) if half else model).merge_and_unload(safe_merge=safe).state_dict()


def by_us(base: str, adapter: str, compute: str) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        dora_convert.merge(base, adapter, f"{folder}/out", compute_dtype=compute)
        return load_file(f"{folder}/out/model.safetensors")


def main(base: str, adapter: str) -> None:
    want = exact(base, adapter)
    before = load_file(f"{base}/model.safetensors")
    changed = [name for name in want if name in before and (want[name] != before[name].double()).any()]
    total = sum(want[name].numel() for name in changed)
    print(f"{total:,} elements in {len(changed)} merged tensors")
    runs = {
        "dora-convert, float64": lambda: by_us(base, adapter, "float64"),
        "dora-convert --compute-dtype float32": lambda: by_us(base, adapter, "float32"),
        "PEFT": lambda: by_peft(base, adapter, safe=False, half=False),
        "PEFT, safe_merge": lambda: by_peft(base, adapter, safe=True, half=False),
        "PEFT, adapter in the base's dtype": lambda: by_peft(base, adapter, safe=False, half=True),
    }
    for title, run in runs.items():
        got = run()
        off = sum((got[name] != rounded(want[name], got[name].dtype)).sum().item() for name in changed)
        print(f"{title:38} {off / total * 1e6:12.1f} of a million off")


if __name__ == "__main__":
    main(*sys.argv[1:])
