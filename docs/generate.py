"""Write docs/cli-reference.md from the command line's help; with --check, fail if the page is not current."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dora_convert.cli import COMMANDS, group

PATH = Path(__file__).parent / "cli-reference.md"
WIDTH = 100
HEAD = """# Command line reference

`docs/generate.py` writes this page from `--help`: change the help, not this page. [cli.md](cli.md) explains
the options.
"""


def help_of(command: click.Command, name: str, parent: click.Context | None = None) -> tuple[str, click.Context]:
    context = click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH, **command.context_settings)
    return f"```text\n{command.get_help(context)}\n```\n", context


def reference() -> str:
    text, context = help_of(group, "dora-convert")
    parts = [HEAD, "## dora-convert\n", text]
    for name in COMMANDS:
        parts += [f"## {name}\n", help_of(group.get_command(context, name), name, context)[0]]
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PATH.write_text(reference(), encoding="utf-8")
    elif PATH.read_text(encoding="utf-8") != reference():
        sys.exit("docs/cli-reference.md is not current; run make format")
