"""Options that several verbs share, declared once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def stack(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, listed in this order in the help."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


strength = stack(
    click.option(
        "--weight", type=float, multiple=True, metavar="W", help="Strength, one per ADAPTER in their order."
    ),
)

workers = stack(
    click.option(
        "--workers", type=click.IntRange(1), metavar="N", help="Threads; default one per processor."
    ),
)


def held_by(default: str, explained: str) -> Callable[[Command], Command]:
    """A memory budget and a number of threads."""
    return stack(
        click.option("--max-memory", default=default, metavar="SIZE", show_default=True, help=explained),
        workers,
    )


held = held_by("160MiB", "Bytes held at once, beyond Python and torch themselves.")

device = stack(
    click.option("--device", default="auto", metavar="auto|cpu|cuda[:N]|mps", help="Where to compute."),
)

arithmetic = stack(
    device,
    click.option(
        "--compute-dtype",
        type=click.Choice(["auto", "float64", "float32"]),
        default="auto",
        help="Arithmetic, rounded once at the end; auto is float64.",
    ),
)

compute = stack(arithmetic, held)

factoring = stack(
    click.option(
        "--rank", type=click.IntRange(1), metavar="N", help="The rank, lowered where a module needs less."
    ),
    click.option(
        "--energy", type=float, metavar="F", help="Or the share of squared singular values to keep."
    ),
    click.option(
        "--max-error", type=float, metavar="F", help="Or the largest relative error of each module."
    ),
    click.option("--exact-svd", is_flag=True, help="Never the randomised SVD, which large matrices get."),
    arithmetic,
    held_by("auto", "Bytes held at once; auto grows to what the largest module needs."),
)

matching = stack(
    click.option(
        "--allow-unmatched", is_flag=True, help="Warn about adapter tensors without a place in the base."
    ),
)

select = stack(
    click.option("--include", multiple=True, metavar="GLOB", help="Only modules of this name; repeatable."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="No modules of this name; repeatable."),
)

reading = stack(
    click.option(
        "--ignore-field", multiple=True, metavar="NAME",
        help="Accept a field of adapter_config.json that this version refuses; repeatable.",
    ),
)  # fmt: skip

token = stack(
    click.option("--token", metavar="TOKEN", help="Hub token; better is HF_TOKEN or hf auth login."),
)

hub = stack(
    click.option(
        "--cache/--no-cache", default=True, help="Keep what comes from the Hub in its cache, or not at all."
    ),
    token,
)

repo = stack(
    click.option("--private", is_flag=True, help="Create the repo private; default as the account has it."),
    click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing."),
    click.option("--commit-message", metavar="TEXT", help="Of the commit or the pull request."),
)

pushing = stack(
    click.option("--push-to-hub", metavar="REPO_ID", help="Upload the result, too, as it is made."),
    repo,
)

base_model = stack(
    click.option(
        "--base-model",
        metavar="ID",
        help="The base's repo id for card and config, where only a path is known.",
    ),
)
adapters_out = stack(
    click.option("--format", default="peft", show_default=True, metavar="NAME", help="Format of the adapter that is written."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
        default="auto",
        help="Of the tensors written, magnitudes excepted; auto keeps each one's own, float32 for computed ones.",
    ),
    base_model,
)  # fmt: skip

writing = stack(
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    click.option("--overwrite", is_flag=True, help="Replace an OUT that exists."),
)

placing = stack(
    click.option("--in-place", is_flag=True, help="Change the checkpoint itself; OUT is not given."),
    click.option(
        "--allow-lossy", is_flag=True, help="In place, do what cannot be taken back bit for bit, too."
    ),
)

talk = stack(
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Only the result's path on stdout."),
    click.option("-v", "--verbose", is_flag=True, help="Every adapter tensor, not only their kinds."),
)
