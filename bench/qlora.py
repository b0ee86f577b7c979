"""Which base for a QLoRA adapter? Train on nf4, merge in each way, and compare with the trained model.

    python bench/qlora.py demo/build/SmolLM2-135M-Instruct [--seed 0 1 2] [--kind lora dora] [--steps 60]

Needs bitsandbytes, transformers and PEFT. Trains a LoRA and a DoRA for each seed on this project's pages, with the
base's weights quantised to nf4 and decoded. Prints for each merge: KL from the trained model's outputs on held-out
text, and the loss on this text. docs/qlora.md has the table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import dora_convert

LENGTH, BATCH, RANK, HELD_OUT = 96, 2, 8, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def nf4(W: Tensor) -> Tensor:
    """Return a weight quantised to nf4 and decoded, as one line, so that blocks lie as they do on a GPU."""
    packed, state = functional.quantize_4bit(
        W.bfloat16().reshape(1, -1), blocksize=64, quant_type="nf4", compress_statistics=False
    )
    state.dtype = torch.float32
    return functional.dequantize_4bit(packed, state).view(W.shape).to(W.dtype)


def load(path: Path | str, *, quantised: bool = False) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, module in model.named_modules() if quantised else ():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            module.weight.data = nf4(module.weight.data)
    return model.eval()


def texts(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return blocks of tokens of this project's pages: for training, and held out."""
    pages = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
    tokens = tokenizer("\n".join(page.read_text(encoding="utf-8") for page in pages), return_tensors="pt").input_ids[0]
    blocks = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return blocks[: len(blocks) * 9 // 10], blocks[len(blocks) * 9 // 10 :][:HELD_OUT]


def train(base: str, blocks: Tensor, seed: int, steps: int, *, dora: bool) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, use_dora=dora, task_type="CAUSAL_LM")
    model = get_peft_model(load(base, quantised=True), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    for _ in range(steps):
        batch = blocks[torch.randint(len(blocks), (BATCH,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def outputs(model: Any, held_out: Tensor) -> Tensor:
    return torch.cat([model(input_ids=block[None]).logits.log_softmax(-1) for block in held_out])


def compare(logs: Tensor, trained: Tensor, held_out: Tensor) -> tuple[float, float]:
    kl = float((trained.exp() * (trained - logs)).sum(-1).mean())
    loss = float(torch.nn.functional.nll_loss(logs[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()))
    return kl, loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kind", choices=["lora", "dora"], nargs="+", default=["lora", "dora"])
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    blocks, held_out = texts(AutoTokenizer.from_pretrained(given.base))
    for kind in given.kind:
        for seed in given.seed:
            with tempfile.TemporaryDirectory() as where:
                one_run(given, blocks, held_out, Path(where), seed=seed, dora=kind == "dora")


def one_run(given: Any, blocks: Tensor, held_out: Tensor, root: Path, *, seed: int, dora: bool) -> None:
    model = train(given.base, blocks, seed, given.steps, dora=dora)
    trained = outputs(model, held_out)
    model.save_pretrained(root / "adapter")
    dora_convert.merge(given.base, root / "adapter", root / "original", device="cpu", undo="none")
    dora_convert.merge(given.base, root / "adapter", root / "as", base_as="nf4", device="cpu", max_memory="1GiB")
    ways = {
        "the trained model": lambda: model,
        "merged, --base-as nf4": lambda: load(root / "as"),
        "merged, default": lambda: load(root / "original"),
        "the default, quantised to nf4": lambda: load(root / "original", quantised=True),
        "--base-as nf4, quantised to nf4 again": lambda: load(root / "as", quantised=True),
        "no adapter, nf4": lambda: load(given.base, quantised=True),
        "no adapter, 16 bits": lambda: load(given.base),
    }
    for way, opened in ways.items():
        kl, loss = compare(outputs(opened(), held_out), trained, held_out)
        print(f"{'DoRA' if dora else 'LoRA'} seed {seed}  {way:40} KL {kl:.4f}  loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
