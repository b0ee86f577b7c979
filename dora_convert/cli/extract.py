"""dora-convert extract."""

from __future__ import annotations

from typing import Any

import click

from . import options
from .made import run_verb


@click.command("extract")
@click.argument("base")
@click.argument("tuned")
@click.argument("out")
@click.option(
    "--kind",
    type=click.Choice(["dora", "lora"]),
    default="dora",
    show_default=True,
    help="dora: magnitudes and factors; lora: factors alone.",
)
@click.option(
    "--embeddings",
    type=click.Choice(["full", "lora", "skip"]),
    default="full",
    show_default=True,
    help="What becomes of embeddings and heads that differ; skip leaves out norms and biases, too.",
)
@options.factoring
@options.adapters_out
@options.pushing
@options.select
@options.writing
@options.hub
@options.talk
def command(
    base: str, tuned: str, out: str, *, as_json: bool, quiet: bool, verbose: bool, **chosen: Any
) -> None:
    """Make an adapter of a fine-tuned checkpoint.

    BASE and TUNED are folders or Hub repos (org/name[@revision]) with tensors of the same names. OUT is a PEFT adapter:
    factors for the linear weights that differ, and everything else that differs whole. How good the factors are is said
    by exactly one of --rank, --energy and --max-error, and is measured.

    \b
    Examples:
      dora-convert extract ./base ./tuned ./dora --rank 16
      dora-convert extract ./base ./tuned ./lora --kind lora --max-error 0.1
    """
    from ..verbs.extract import extract

    run_verb(extract, base, tuned, out, as_json=as_json, quiet=quiet, verbose=verbose, **chosen)
