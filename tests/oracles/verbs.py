"""Run every verb on tiny models whose weights lie otherwise on disk than in memory, and compare with PEFT.

    python -m tests.oracles.verbs                 the families below
    python -m tests.oracles.verbs mixtral llava   some model types

The base lies as on the Hub. Each of PEFT's adapters (LoRA, DoRA, all-linear, experts) is merged, verified by weights,
and taken out again: bit for bit with an exact record. to-lora and from-lora write adapters that PEFT loads: logits are
compared. extract takes the merge for a fine-tuned checkpoint; what it writes is loaded by PEFT and merged by us.
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import dora_convert

from . import families, tiny

FAMILIES = (
    "mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "olmo_hybrid", "kimi_linear", "phi3", "qwen2_vl", "llava",
    "gemma3", "granitemoe", "gpt_neox", "nemotron_h", "gpt_oss", "dinov2", "llama",
)  # fmt: skip
CLOSE = 2e-3


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the greatest difference of two checkpoints; infinity if names or shapes differ."""
    if {name: x.shape for name, x in one.items()} != {name: x.shape for name, x in other.items()}:
        return float("inf")
    return max((one[name].double() - x.double()).abs().max().item() for name, x in other.items() if x.numel())


def answers(model: Any, adapter: Path | None = None) -> torch.Tensor | str:
    """Return the logits of a model, or of a copy with an adapter that PEFT loads."""
    if adapter:
        model = PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval()
    return families.logits(model)


def near(one: torch.Tensor | str, other: torch.Tensor | str) -> str:
    """Return "" for logits that agree, or that text alone does not give; else the difference."""
    if isinstance(one, str) or isinstance(other, str):
        return ""
    worst = (one - other).abs().max().item()
    return "" if worst <= CLOSE else f"logits {worst:.2g} apart"


class Case:
    """One adapter of one tiny model."""

    def __init__(self, model: Any, folder: Path, fields: dict[str, Any], *, is_head: bool) -> None:
        self.model, self.folder, self.base = model, folder, folder / "hub"
        self.adapter = folder / "adapter"
        config = LoraConfig(r=families.RANK, lora_alpha=families.ALPHA, **fields)
        adapted = families.randomised(get_peft_model(copy.deepcopy(model), config)).eval()
        adapted.save_pretrained(self.adapter)
        self.answer = families.logits(adapted)
        self.is_dora, self.is_head = bool(fields.get("use_dora")), is_head

    def run(self, verb: Callable[..., Any], *inputs: Path, out: str, **options: Any) -> Path:
        verb(*inputs, self.folder / out, **options)
        return self.folder / out

    def merge(self) -> str:
        """Merge with an exact record, verify, and unmerge bit for bit."""
        out = self.run(dora_convert.merge, self.base, self.adapter, out="exact", undo="exact")
        if (verdict := dora_convert.verify(self.base, self.adapter, out).verdict) != "agree":
            return f"verify says {verdict}"
        back = self.run(dora_convert.unmerge, out, self.adapter, out="back")
        same = weights(back)
        wrong = [name for name, x in weights(self.base).items() if not torch.equal(same[name], x)]
        return f"{len(wrong)} tensors have other bits after unmerge" if wrong else ""

    def unmerge(self) -> str:
        """Merge with a record of norms, and unmerge up to rounding."""
        out = self.run(dora_convert.merge, self.base, self.adapter, out="norms", undo="norms")
        worst = apart(weights(self.run(dora_convert.unmerge, out, self.adapter, out="again")), weights(self.base))
        return f"{worst:.2g} apart" if worst > 1e-5 else ""

    def from_lora(self) -> str:
        """Make a DoRA of a LoRA; what cannot be one is left a LoRA."""
        if self.is_dora:
            return ""
        try:
            out = self.run(dora_convert.from_lora, self.base, self.adapter, out="dora", split=True)
        except dora_convert.DoraConvertError as error:
            return "" if "cannot be DoRA" in str(error) else str(error)
        parts = [out, *([out / "lora"] if (out / "lora").is_dir() else [])]
        dora_convert.merge(self.base, parts, self.folder / "by dora")
        worst = apart(weights(self.folder / "by dora"), weights(self.folder / "norms"))
        if worst > 1e-5:
            return f"{worst:.2g} apart"
        return "" if len(parts) > 1 else near(answers(self.model, out), self.answer)

    def to_lora(self) -> str:
        """Make a LoRA of a DoRA at full rank."""
        if not self.is_dora:
            return ""
        out = self.run(dora_convert.to_lora, self.base, self.adapter, out="lora", max_error=1e-6, exact_svd=True)
        return near(answers(self.model, out), self.answer)

    def extract(self) -> str:
        """Make an adapter of the merged checkpoint; a head alone is saved whole, which PEFT does not load."""
        tuned = self.folder / "norms"
        options = {"kind": "lora", "max_error": 1e-6, "exact_svd": True}
        try:
            out = self.run(dora_convert.extract, self.base, tuned, out="extracted", **options)
        except dora_convert.UnsupportedError as error:
            return "" if self.is_head and "PEFT loads no adapter without factors" in str(error) else str(error)
        worst = apart(weights(self.run(dora_convert.merge, self.base, out, out="by extracted")), weights(tuned))
        if worst > 1e-4:
            return f"{worst:.2g} apart"
        theirs = type(self.model).from_pretrained(tuned, config=self.model.config, dtype=torch.float32).eval()
        return near(answers(self.model, out), families.logits(theirs))

    def inspect(self) -> str:
        """Ask where the adapter's tensors would land."""
        landing = dora_convert.inspect(self.adapter, base=self.base).landing
        return "" if landing and landing.fits else f"inspect --base refuses it: {landing and landing.message}"


def try_family(family: str) -> Iterator[tuple[str, str, str]]:
    """Yield (adapter, verb, what is wrong) of everything that was tried."""
    model = tiny.tiny(families.chosen([family])[family])
    if isinstance(model, str):
        yield "", "model", model
        return
    for kind, fields in families.adapters(model):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                families.save(model, "hub", folder / "hub")
                case = Case(model, folder, fields, is_head=kind == "head")
            except Exception as error:  # noqa: BLE001 # PEFT's own
                yield kind, "PEFT", f"{type(error).__name__}: {error}"[:160]
                continue
            for verb in ("merge", "unmerge", "from_lora", "to_lora", "extract", "inspect"):
                yield kind, verb, tried(getattr(case, verb))


def tried(verb: Callable[[], str]) -> str:
    """Return what a verb finds wrong, or its error."""
    try:
        return verb()
    except Exception as error:  # noqa: BLE001 # reported
        return f"{type(error).__name__}: {error}"[:500]


def main() -> int:
    """Run all families or some; print what is wrong."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    results: Counter[str] = Counter()
    for family in sys.argv[1:] or FAMILIES:
        for kind, verb, wrong in try_family(family):
            result = "PEFT" if verb in ("PEFT", "model") else "wrong" if wrong else "right"
            results[result] += 1
            if wrong:
                sys.stdout.write(f"{family}: {kind}: {verb}: {wrong}\n")
        sys.stdout.write(f"{family}: {dict(results)}\n")
        sys.stdout.flush()
    return int(bool(results["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
