"""Show that a merged model computes the function of base and adapter, and answers differently from the base.

    python compare.py BASE ADAPTER MERGED EXACT

EXACT is the same merge written in float32, so that rounding excuses no difference. PEFT runs base and adapter
unmerged, in a computation that shares no code with dora-convert.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import torch

TOLERANCE = 1e-5
QUESTIONS = [
    "What is the capital of France?",
    "What should I cook tonight?",
    "What is a library?",
    "Give me advice for a long journey.",
]


def encode(tokenizer: Any, question: str) -> torch.Tensor:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]


def answer(model: Any, tokenizer: Any, question: str) -> str:
    ids = encode(tokenizer, question)
    with torch.no_grad():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip().split("\n")[0]


def logits(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(encode(tokenizer, question)).logits.double() for question in QUESTIONS]


def difference(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Return the relative error of all logits together."""
    apart = sum((a - b).square().sum() for a, b in zip(got, want, strict=True))
    return float((apart / sum(b.square().sum() for b in want)).sqrt())


def main(base: str, adapter: str, merged: str, exact: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def load(path: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    plain, ours = load(base), load(merged)
    before = [answer(plain, tokenizer, question) for question in QUESTIONS]
    from_base = logits(plain, tokenizer)
    adapted = PeftModel.from_pretrained(plain, adapter).eval()
    reference = logits(adapted, tokenizer)
    from_ours = logits(ours, tokenizer)
    after = [answer(ours, tokenizer, question) for question in QUESTIONS]

    in_float32 = difference(logits(load(exact), tokenizer), reference)
    print("\nlogits against PEFT's unmerged forward, relative error")
    print(f"  merged, float32    {in_float32:.1e}")
    print(f"  merged, bfloat16   {difference(from_ours, reference):.1e}   what rounding the weights leaves")
    print(f"  base alone         {difference(from_base, reference):.1e}\n")
    for question, old, new in zip(QUESTIONS, before, after, strict=True):
        print(f"you     {question}\nbase    {old}\nmerged  {new}\n")
    if in_float32 > TOLERANCE:
        sys.exit("the merged model does not do what base and adapter do")


if __name__ == "__main__":
    main(*sys.argv[1:])
