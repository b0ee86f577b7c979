"""The model card of a merged checkpoint: what it is made of, and the command that makes it again."""

from __future__ import annotations

import shlex

from . import __version__
from .orders import Order
from .plan import Plan
from .refs import Source
from .stored import CONFIG_DTYPES

NAME = "README.md"


def card_bytes(plan: Plan, base_model: str | None) -> bytes:
    """README.md for OUT. `base_model` is the base's repo id where only a path is known; a path is never written."""
    base = plan.base.source
    kinds = sorted({adapter.kind for adapter in plan.adapters})
    repo = base_model or base.repo
    lines = ["---", *(["library_name: transformers"] if plan.base.model_types else [])]
    if repo:
        lines += [f"base_model: {repo}", "base_model_relation: finetune"]
    lines += ["tags:", *(f"- {tag}" for tag in (*map(str.lower, kinds), "merged", "dora-convert")), "---", ""]
    counts = plan.counts()
    lines += [
        f"# {base.name} with {', '.join(adapter.source.name for adapter in plan.adapters)}",
        "",
        f"{' and '.join(kinds)} folded into the weights of {base.name}.",
        f"{counts['merged']} tensors merged, {counts['replaced']} replaced, {counts['copied']} copied as they were.",
        "",
        "| | name | commit |",
        "|---|---|---|",
        _row("base", base),
        *(_row("adapter", adapter.source) for adapter in plan.adapters),
        "",
        f"Made by dora-convert {__version__}:",
        "",
        "```bash",
        shlex.join(command(plan)),
        "```",
        "",
        "`dora_convert/receipt.json` lists every tensor that changed with its hashes.",
        "",
    ]
    return "\n".join(lines).encode()


def adapter_card_bytes(order: Order, base_model: str | None) -> bytes:
    """README.md for an adapter that was made of others, or of two checkpoints; a path is never written."""
    base = order.bases[0].source
    repo = base_model or base.repo
    roles = ("base", *(["tuned"] if len(order.bases) > 1 else []), *(["adapter"] if order.like else []))
    lines = ["---", "library_name: peft"]
    if repo:
        lines += [f"base_model: {repo}", "base_model_relation: adapter"]
    lines += ["tags:", "- dora" if order.makes_dora else "- lora", "- dora-convert", "---", ""]
    lines += [
        f"# {'DoRA' if order.makes_dora else 'LoRA'} of {order.sources[-1].name}",
        "",
        f"An adapter for {base.name}, made by `{order.command}` of dora-convert {__version__}:",
        "",
        "```bash",
        shlex.join(["dora-convert", order.command, *order.words]),
        "```",
        "",
        "| | name | commit |",
        "|---|---|---|",
        *(_row(role, source) for role, source in zip(roles, order.sources, strict=True)),
        "",
    ]
    return "\n".join(lines).encode()


def command(plan: Plan) -> list[str]:
    """The command line that makes this output again; inputs by title, the output as OUT."""
    options = plan.options
    words = ["dora-convert", "merge", *(source.title for source in _sources(plan)), "OUT"]
    if any(weight != 1 for weight in plan.weights):
        words += [word for weight in plan.weights for word in ("--weight", f"{weight:g}")]
    for flag, value in (
        ("--dtype", CONFIG_DTYPES.get(options.dtype or "")),
        ("--compute-dtype", "float32" if options.compute_dtype == "F32" else None),
        ("--max-shard-size", options.max_shard_size),
        ("--undo", options.undo if options.undo != "norms" else None),
        *(("--include", glob) for glob in options.include),
        *(("--exclude", glob) for glob in options.exclude),
    ):
        words += [flag, str(value)] if value else []
    return words


def _sources(plan: Plan) -> list[Source]:
    return [plan.base.source, *(adapter.source for adapter in plan.adapters)]


def _row(role: str, source: Source) -> str:
    return f"| {role} | {source.repo or source.name} | {source.commit or ''} |"
