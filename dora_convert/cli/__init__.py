"""Run the command line: a Click group whose commands are imported when they are called.

Commands collect options, call the library, and hand the report to a sink. They never compute and never print.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, TextIO, get_args

import click

from ..option_table import Option
from ..options import SHORT_NAMES, Path, flag, options_of
from ..settings import __version__
from ..torch_import import begun, ends_at_once, has_folder, own_process
from .sink import Sink, colour, fail

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS = {
    "merge": "fold adapters into a base checkpoint",
    "unmerge": "take adapters out of a merged checkpoint again",
    "from-lora": "LoRA to DoRA, outputs preserved",
    "to-lora": "DoRA, or any adapter, to LoRA by SVD; LoRA to another rank",
    "extract": "fine-tuned checkpoint to adapter",
    "convert": "adapter to another tool's format",
    "verify": "compare a merged checkpoint with base + adapter",
    "analyze": "measure how far training moved each weight, in magnitude and direction",
    "inspect": "describe an adapter or a checkpoint from its headers, local or remote",
    "push": "upload a checkpoint or an adapter, with a model card",
}
TOOLS = {
    "completion": "complete commands, paths and repos in bash, zsh and fish",
    "env": "versions, devices and settings, for a bug report",
}
"""Commands that are not verbs."""
ENVIRONMENT = frozenset({"device", "compute_dtype", "max_memory", "workers", "max_shard_size", "cache"})
"""Options whose defaults come from variables such as DORA_CONVERT_MAX_MEMORY: choices of a machine."""
ADAPTERS = frozenset({"from-lora", "to-lora", "extract"})
"""Verbs that write an adapter: their commands are in one module."""
READING = frozenset({"verify", "analyze", "inspect", "push"})
"""Verbs that write nothing on this machine."""


class Lazy(click.Group):
    """A group that knows its commands by name and imports a command when it is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = dict.fromkeys([*COMMANDS, *TOOLS])  # type: ignore[assignment] # names: for "did you mean"

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return all verbs, in the order of a typical session, and then the tools."""
        return [*COMMANDS, *TOOLS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return the command of a verb, a function of the verb's name."""
        if cmd_name not in self.commands:
            return None
        module = import_module(f".{'adapters' if cmd_name in ADAPTERS else cmd_name}", __name__)
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the verbs from the table: help imports none of them."""
        for title, commands in (("Commands", COMMANDS), ("Tools", TOOLS)):
            with formatter.section(title):
                formatter.write_dl(list(commands.items()))


class GroupedCommand(click.Command):
    """A command whose help shows its options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options; the code of the groups is imported for help alone."""
        from .help import write_options

        write_options(self, ctx, formatter)


command = partial(click.command, cls=GroupedCommand)


class Ref(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic since click 8.4
    """A path or a repo, completed from both."""

    name = "ref"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the completions of a word."""
        del ctx, param
        from .completion import references

        return references(incomplete)


REF = Ref()


class OneOf(click.Choice):  # type: ignore[type-arg,unused-ignore] # generic since click 8.2
    """One of some words; of another word, the error names the closest."""

    def get_invalid_choice_message(self, value: object, ctx: click.Context | None) -> str:
        """Return the message for another word."""
        from ..errors import closest

        meant = closest(str(value), self.choices)
        return super().get_invalid_choice_message(value, ctx) + (f" Did you mean {meant!r}?" if meant else "")


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Move between base + adapter and checkpoint: LoRA and DoRA, streaming, exact.

    \b
    Example:
      dora-convert merge org/base ./adapter ./merged
    """
    ctx.color = colour()


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; raises SystemExit with the exit code that docs/cli.md gives."""
    words = list(sys.argv[1:] if args is None else args)
    if "_DORA_CONVERT_COMPLETE" in os.environ:
        from . import completion  # noqa: F401 - which registers its script for bash
    try:
        code = group.main(words, prog_name="dora-convert", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except (Exception, KeyboardInterrupt) as error:
        # CPython remembers a Ctrl-C that came while it ran a string, as dataclasses do, even if that was
        # caught, and with -m dies of it at the end instead of exiting with our code. Running another
        # string clears it.
        exec("")  # noqa: S102
        if os.environ.get("DORA_CONVERT_DEBUG"):
            raise
        code = fail(error, as_json="--json" in words, reads=bool(READING.intersection(words[:1])))
    if args is None:
        _drop_unwritten(sys.stdout)
        _drop_unwritten(sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def run() -> None:
    """Run the command line as a process of its own; raises SystemExit as `main` does, or ends the process.

    Python takes a tenth of a second to take torch apart at the end. So a process that has torch, or has begun to
    load it, and whose threads are done, runs the functions that modules have registered for the end, and ends at once.
    """
    own_process[0] = True
    try:
        main()
    except SystemExit as end:
        threads = threading.enumerate()
        has_torch = begun[0] or "torch" in sys.modules
        if not has_torch or not all(each.daemon or each is threading.main_thread() for each in threads):
            raise
        ends_at_once[0] = True
        atexit._run_exitfuncs()  # noqa: SLF001 - no public name
        _drop_unwritten(sys.stdout)
        _drop_unwritten(sys.stderr)
        os._exit(end.code if isinstance(end.code, int) else 0)


def _drop_unwritten(stream: TextIO) -> None:
    """Drop text that a stream does not take, or Python would fail over it after the exit code is known."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), stream.fileno())


Command = Callable[..., Any]

OUTPUT = (
    click.option("-v", "--verbose", is_flag=True, help="List every adapter tensor, not only their kinds."),
    click.option("-q", "--quiet", is_flag=True, help="Print only the result's path on stdout."),
    click.option("--tsv", is_flag=True, help="Print tables as tab-separated values."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
)


def takes(group: type) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the options of a group and those of the output's form.

    The command gets a `sink`, and, if the group has them, the sink's callbacks for its verb.
    """
    options = options_of(group)

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_callbacks(*, sink: Sink, **keywords: Any) -> Any:
            callbacks = {"on_progress": sink.progress, "on_notice": sink.notice}
            return command(sink=sink, **keywords, **{name: callbacks[name] for name in callbacks if name in options})

        decorated = takes_sink(with_callbacks)
        for name, (kind, option) in reversed(options.items()):
            if not name.startswith("on_"):
                decorated = _option(name, kind, option)(decorated)
        return decorated

    return decorate


def takes_sink(command: Command) -> Command:
    """Give a command the options of the output's form, and a `sink` of that form."""

    @wraps(command)
    def with_sink(*, as_json: bool, tsv: bool, quiet: bool, verbose: bool, **keywords: Any) -> Any:
        if not has_folder():
            raise click.UsageError("The current folder no longer exists. Change to another one, and try again.")
        with closing(Sink(as_json=as_json, tsv=tsv, quiet=quiet, verbose=verbose)) as sink:
            return command(sink=sink, **keywords)

    decorated: Command = with_sink
    for add in OUTPUT:
        decorated = add(decorated)
    return decorated


def _option(name: str, kind: Any, option: Option) -> Callable[[Command], Command]:
    """Return one option of the command line."""
    default, word = option.default, flag(name)
    variable = f"DORA_CONVERT_{name.upper()}" if name in ENVIRONMENT else None
    if kind is bool:
        names = f"{word}/--no-{word[2:]}" if default else word
        return click.option(names, is_flag=True, default=default, help=option.help, envvar=variable, show_envvar=True)
    return click.option(
        word,
        type=_type(kind, option),
        multiple=default == (),
        default=None if default == () else default,
        show_default=default not in (None, (), "auto"),
        metavar=option.metavar or (f"[{'|'.join(option.choices)}]" if option.choices else None),
        help=option.help,
        envvar=variable,
        show_envvar=True,
        shell_complete=_devices if name == "device" else None,
    )


def _devices(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001
    """Return the completions of a device's name."""
    return [name for name in ("auto", "cpu", "cuda", "cuda:0", "cuda:0,1", "mps") if name.startswith(incomplete)]


def _type(kind: Any, option: Option) -> Any:
    """Return the type that checks a word of the command line."""
    if option.choices:
        short = [word for word, name in SHORT_NAMES.items() if name in option.choices]
        return OneOf([*option.choices, *short])
    if option.least is not None:
        return click.IntRange(option.least)
    if float in get_args(kind):
        return float
    if option.metavar == "REF":
        return REF
    return click.Path() if set(get_args(Path)) <= set(get_args(kind)) else str
