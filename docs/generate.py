"""Write the pages and the types that follow from the options; --check fails if one is not current."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from schema import schema

import dora_convert
from dora_convert.cli import COMMANDS, group

ROOT = Path(__file__).parent.parent
WIDTH = 100
HEAD = """# Command line reference

`docs/generate.py` writes this page from `--help`: change the help, not this page. [cli.md](cli.md) explains
the options.
"""
API = """# Functions

`docs/generate.py` writes this page from the docstrings: change these, not this page. [Python](python.md) has examples.
"""
STUB = '''"""The public names with their types; docs/generate.py writes this file."""

import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import Module

{imports}

_Path = str | os.PathLike[str]
_Dtype = str | torch.dtype
_Device = str | torch.device | Sequence[str | torch.device]

__version__: str
__all__: list[str]

def __dir__() -> list[str]: ...
'''
ALIASES = {"PathLike": "_Path", "Path": "_Path", "Dtype": "_Dtype", "Device": "_Device"}


def help_of(command: click.Command, name: str, parent: click.Context | None = None) -> tuple[str, click.Context]:
    context = click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH, **command.context_settings)
    return f"```text\n{command.get_help(context)}\n```\n", context


def reference() -> str:
    text, context = help_of(group, "dora-convert")
    parts = [HEAD, "## dora-convert\n", text]
    for name in COMMANDS:
        parts += [f"## {name}\n", help_of(group.get_command(context, name), name, context)[0]]
    return "\n".join(parts)


def stub() -> str:
    """Return the types of the package's face: every option by name, and reports without a cast."""
    owners = dora_convert._OWNER  # noqa: SLF001
    classes = [name for name in owners if isinstance(getattr(dora_convert, name), type)]
    imports = sorted(f"from .{owners[name]} import {name} as {name}" for name in classes)
    functions = [line for name in owners if name not in classes for line in declared(name, owners[name])]
    return STUB.format(imports="\n".join(imports)) + "\n" + "\n".join(functions)


def declared(name: str, module: str) -> Iterator[str]:
    """Yield the lines of a function, overloaded by the options that decide its report."""
    function = getattr(dora_convert, name)
    returns = str(inspect.signature(function).return_annotation)
    kinds = annotations(getattr(import_module(f"dora_convert.{module}"), name))
    dry = [kind for kind in returns.split(" | ") if "Dry" in kind]
    wet = [kind for kind in returns.split(" | ") if "Dry" not in kind]
    cases: list[tuple[str, str, str]] = [("", "", returns)]
    if dry:
        cases = [("dry_run", "Literal[False]", " | ".join(wet)), ("dry_run", "Literal[True]", dry[0])]
        cases.append(("dry_run", "bool", returns))
    elif name == "verify":
        cases = [("level", 'Literal["weights"]', "VerifyReport"), ("level", 'Literal["outputs"]', "OutputsReport")]
        cases.append(("level", "str", returns))
    for option, kind, result in cases:
        yield from (["@overload"] if option else [])
        yield f"def {name}("
        yield from parameters(inspect.signature(function), {**kinds, option: kind}, option, kind)
        yield f") -> {result}: ..."


def annotations(function: Callable[..., Any]) -> dict[str, str]:
    """Return the types of a function's parameters and options, as they are written."""
    plain = getattr(function, "__wrapped__", function)
    found = {name: str(kind) for name, kind in plain.__annotations__.items()}
    if unpacked := re.fullmatch(r"Unpack\[(\w+)\]", found.get("options", "")):
        group = sys.modules[plain.__module__].__dict__[unpacked[1]]
        found |= {name: kind.__forward_arg__ for name, kind in group.__annotations__.items()}
    return {
        name: re.sub(r"\b[A-Z]\w+", lambda match: ALIASES.get(match[0], match[0]), kind) for name, kind in found.items()
    }


def parameters(signature: inspect.Signature, kinds: dict[str, str], option: str, kind: str) -> Iterator[str]:
    """Yield one line a parameter; the option that decides must be given unless its default does."""
    keywords = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            keywords = True
            yield "    *,"
        decides = parameter.name == option and kind in ("Literal[True]", 'Literal["outputs"]', "bool", "str")
        has_default = parameter.default is not parameter.empty and not decides
        default = f" = {parameter.default!r}" if has_default else ""
        yield f"    {parameter.name}: {kinds.get(parameter.name, 'bool')}{default},"


def functions() -> str:
    """Return the page of the public functions, and the directives for the pages of the classes."""
    owners = dora_convert._OWNER  # noqa: SLF001
    parts = [API]
    for name in sorted(owners):
        value = getattr(dora_convert, name)
        if isinstance(value, type):
            continue
        prose, _, listed = str(value.__doc__).partition("Options:\n")
        rows = [line.strip().partition(": ") for line in listed.splitlines()]
        text = "".join(f"| `{option}` | {help_text.replace('|', '∣')} |\n" for option, _, help_text in rows)
        table = f"| option | meaning |\n|---|---|\n{text}\n" if rows else ""
        parts += [f"## {name}\n\n{prose.strip()}\n\n{table}"]
    classes = sorted(
        f"::: dora_convert.{owners[name]}.{name}\n" for name in owners if isinstance(getattr(dora_convert, name), type)
    )
    return "\n".join([*parts, "## Classes\n", *classes])


PAGES = {
    ROOT / "docs/api.md": functions,
    ROOT / "docs/cli-reference.md": reference,
    ROOT / "dora_convert/__init__.pyi": stub,
    ROOT / "dora_convert/report.schema.json": schema,
}

if __name__ == "__main__":
    for path, write in PAGES.items():
        if "--check" not in sys.argv:
            path.write_text(write(), encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != write():
            sys.exit(f"{path.relative_to(ROOT)} is not current; run make format")
