"""Train SmolLM2-135M-Instruct three ways, a few steps each: all weights, a LoRA, and a DoRA.

    python clouds.py BASE OUT

OUT gets full/, lora/ and dora/, each with a folder checkpoint-N for every quarter of the training, as a Trainer
leaves them. `make figures` draws them with `dora-convert analyze`. Training takes about five minutes on two CPU
cores and 3 GB of disk; nothing of it is committed but the picture.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from train import batch, encode
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, SAVES, BATCH, SEED = 24, 4, 2, 0
RATES = {"full": 1e-4, "lora": 1e-3, "dora": 1e-3}
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
"""The modules of the paper's LLaMA experiments, with alpha twice the rank."""


def adapted(model: Any, kind: str) -> Any:
    """Return the model with an adapter of a kind; all weights are trained without one."""
    if kind == "full":
        return model
    config = LoraConfig(r=16, lora_alpha=32, use_dora=kind == "dora", target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def train(model: Any, kind: str, examples: list[tuple[list[int], list[int]]], out: Path) -> None:
    """Train with AdamW and a linear decay over random batches, and save each quarter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATES[kind], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    for step in range(1, STEPS + 1):
        loss = model(**batch(random.sample(examples, BATCH))).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % (STEPS // SAVES) == 0:
            model.save_pretrained(out / f"checkpoint-{step}")
            print(f"{kind} step {step:3d}  loss {loss.item():.3f}", flush=True)


def main(base: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    pairs = json.loads((Path(__file__).parent / "pirate.json").read_text())
    examples = [encode(tokenizer, *pair) for pair in pairs]
    for kind in RATES:
        random.seed(SEED)
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        train(adapted(model, kind), kind, examples, Path(out) / kind)


if __name__ == "__main__":
    main(*sys.argv[1:])
