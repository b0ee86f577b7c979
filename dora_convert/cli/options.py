"""Declare the options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce, wraps
from typing import Any, TypeVar

import click

from .sink import Sink

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]


def stack(*options: Decorator[Command]) -> Decorator[Command]:
    """Return several options as one decorator, listed in this order in the help."""
    return lambda command: reduce(lambda inner, option: option(inner), reversed(options), command)


def memory(default: str | None, explained: str) -> Callable[[Command], Command]:
    """Return the option of a memory budget."""
    shown = default is not None
    return click.option("--max-memory", default=default, metavar="SIZE", show_default=shown, help=explained)


strength = click.option(
    "--weight", type=float, multiple=True, metavar="W", help="Strength, one per ADAPTER in their order."
)
workers = click.option(
    "--workers", type=click.IntRange(1), metavar="N", help="Threads; default one per processor."
)
device = click.option(
    "--device", default="auto", metavar="auto|cpu|cuda[:N]|mps", help="Device that computes."
)
arithmetic = stack(
    device,
    click.option(
        "--compute-dtype",
        type=click.Choice(["auto", "float64", "float32"]),
        default="auto",
        help="Dtype of the arithmetic, rounded once at the end; auto is float64.",
    ),
)
compute = stack(arithmetic, memory("160MiB", "Bytes held at once, beyond Python and torch."), workers)
goal = stack(
    click.option(
        "--rank", type=click.IntRange(1), metavar="N", help="The rank, lowered for a module that needs less."
    ),
    click.option(
        "--energy", type=float, metavar="F", help="Or the share of squared singular values to keep."
    ),
    click.option(
        "--max-error", type=float, metavar="F", help="Or the largest relative error of each module."
    ),
    click.option("--exact-svd", is_flag=True, help="Never use the randomised SVD, which large matrices get."),
)
factoring = stack(
    goal,
    arithmetic,
    memory("auto", "Bytes held at once; auto grows to the need of the largest module."),
    workers,
)
max_shard_size = click.option(
    "--max-shard-size", metavar="SIZE", help="Such as 5GB or 4GiB; default the base's own shards."
)
verify = click.option(
    "--verify/--no-verify", default=True, help="Check a sample of the output before publishing."
)
matching = click.option(
    "--allow-unmatched", is_flag=True, help="Warn about adapter tensors that match nothing in the base."
)
select = stack(
    click.option("--include", multiple=True, metavar="GLOB", help="Only modules of this name; repeatable."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="No modules of this name; repeatable."),
)
reading = click.option(
    "--ignore-field",
    multiple=True,
    metavar="NAME",
    help="Accept a field of adapter_config.json that this version refuses; repeatable.",
)
token = click.option("--token", metavar="TOKEN", help="Hub token; better is HF_TOKEN or hf auth login.")
hub = stack(
    click.option(
        "--cache/--no-cache", default=True, help="Keep downloads in the Hub cache, or remove them at the end."
    ),
    token,
)
repo = stack(
    click.option("--private", is_flag=True, help="Create the repo private; default the account's own."),
    click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing."),
    click.option("--commit-message", metavar="TEXT", help="Message of the commit or the pull request."),
)
pushing = stack(
    click.option("--push-to-hub", metavar="REPO_ID", help="Upload the result, too, while it is written."),
    repo,
)
base_model = click.option(
    "--base-model", metavar="ID", help="The base's repo id for card and config, if only a path is known."
)
adapters_out = stack(
    click.option(
        "--format", default="peft", show_default=True, metavar="NAME", help="Format of the new adapter."
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
        default="auto",
        help="Dtype of the tensors written, except magnitudes; auto keeps each tensor's own, float32 for new ones.",
    ),
    base_model,
)
writing = stack(
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    click.option("--overwrite", is_flag=True, help="Replace an existing OUT."),
)
in_place = stack(
    click.option("--in-place", is_flag=True, help="Change the checkpoint itself; take no OUT."),
    click.option("--allow-lossy", is_flag=True, help="In place, do even what cannot be undone bit for bit."),
)


def answer(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the output's form; the command gets a `sink` instead of them."""

    @wraps(command)
    def with_sink(*, as_json: bool, quiet: bool, verbose: bool, **keywords: Any) -> Any:
        with Sink(as_json=as_json, quiet=quiet, verbose=verbose) as sink:
            return command(sink=sink, **keywords)

    return stack(
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
        click.option("-q", "--quiet", is_flag=True, help="Print only the result's path on stdout."),
        click.option(
            "-v", "--verbose", is_flag=True, help="List every adapter tensor, not only their kinds."
        ),
    )(with_sink)


def talk(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the output's form; the command gets a `sink`, and the sink's callbacks for its verb."""

    @wraps(command)
    def with_callbacks(*, sink: Sink, **keywords: Any) -> Any:
        return command(sink=sink, on_progress=sink.progress, on_notice=sink.notice, **keywords)

    return answer(with_callbacks)
