"""Make a command's options of the group that its verb declares."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import wraps
from typing import Any, get_args

import click

from ..options import Option, Path, flag, options_of
from .sink import Sink

Command = Callable[..., Any]

OUTPUT = (
    click.option("-v", "--verbose", is_flag=True, help="List every adapter tensor, not only their kinds."),
    click.option("-q", "--quiet", is_flag=True, help="Print only the result's path on stdout."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
)


def takes(group: type) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the options of a group and those of the output's form.

    The command gets a `sink`, and, if the group has them, the sink's callbacks for its verb.
    """
    options = options_of(group)

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_sink(*, as_json: bool, quiet: bool, verbose: bool, **keywords: Any) -> Any:
            with closing(Sink(as_json=as_json, quiet=quiet, verbose=verbose)) as sink:
                callbacks = {"on_progress": sink.progress, "on_notice": sink.notice}
                keywords |= {name: call for name, call in callbacks.items() if name in options}
                return command(sink=sink, **keywords)

        decorated: Command = with_sink
        for add in OUTPUT:
            decorated = add(decorated)
        for name, (kind, option) in reversed(options.items()):
            if not name.startswith("on_"):
                decorated = _option(name, kind, option)(decorated)
        return decorated

    return decorate


def _option(name: str, kind: Any, option: Option) -> Callable[[Command], Command]:
    """Return one option of the command line."""
    default, word = option.default, flag(name)
    if kind is bool:
        names = f"{word}/--no-{word[2:]}" if default else word
        return click.option(names, is_flag=True, default=default, help=option.help)
    return click.option(
        word,
        type=_type(kind, option),
        multiple=default == (),
        default=None if default == () else default,
        show_default=default not in (None, (), "auto"),
        metavar=option.metavar,
        help=option.help,
    )


def _type(kind: Any, option: Option) -> Any:
    """Return the type that checks a word of the command line."""
    if option.choices:
        return click.Choice(option.choices)
    if option.least is not None:
        return click.IntRange(option.least)
    if float in get_args(kind):
        return float
    return click.Path() if set(get_args(Path)) <= set(get_args(kind)) else str
