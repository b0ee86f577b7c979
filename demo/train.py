"""Train the demo's adapter: a small DoRA that makes SmolLM2-135M-Instruct talk like a pirate.

    python train.py BASE OUT

Training takes about five minutes on two CPU cores. The result is committed as demo/pirate, so `make demo`
does not train.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, BATCH, LEARNING_RATE, SEED = 160, 4, 7e-4, 0
IGNORED = -100  # the label that cross entropy leaves out


def encode(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the token ids of one exchange, and labels that count only the answer."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    return before + after, [IGNORED] * len(before) + after


def batch(examples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Return the right-padded tensors of a few examples."""
    longest = max(len(ids) for ids, _ in examples)

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([ids for ids, _ in examples], 2),
        "attention_mask": padded([[1] * len(ids) for ids, _ in examples], 0),
        "labels": padded([labels for _, labels in examples], IGNORED),
    }


def train(model: PeftModel, examples: list[tuple[list[int], list[int]]]) -> None:
    """Train with Adam and a linear decay over random batches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    for step in range(STEPS):
        loss = model(**batch(random.sample(examples, BATCH))).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}", flush=True)


def main(base: str, out: str) -> None:
    random.seed(SEED)
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=16, use_dora=True, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    pairs = json.loads((Path(__file__).parent / "pirate.json").read_text())
    train(model, [encode(tokenizer, *pair) for pair in pairs])
    model.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
