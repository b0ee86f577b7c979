"""Draw the pages of verify, analyze and inspect: the frame that they share is page.html.j2."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ..errors import printable
from ..options import flag, options_of
from ..settings import __version__
from . import Report
from .glossary import TERMS

if TYPE_CHECKING:
    from jinja2 import Environment

UNSAID = ("token", "on_progress", "on_notice")
"""Options that no page shows."""
PLACES = re.compile(r"/(?=[^/\s<])|(?<!\d)\.(?=[^.\s<])|(?<=\d)\.(?=[^.\s<\d])")
"""The dots and slashes behind which a name wraps: those of a number are none."""
LIBRARIES = ("torch", "safetensors", "transformers", "peft", "accelerate")


def environment() -> Environment:
    """Return the templates of this folder, which escape everything that could be markup or control a terminal."""
    from jinja2 import Environment, PackageLoader

    templates = Environment(
        loader=PackageLoader("dora_convert", "reports"),
        autoescape=True,
        finalize=lambda value: printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "count": "{:,}".format,
        "name": WrappingName,
        "error": lambda value: "–" if value is None else f"{value:.1e}",
        "number": lambda value: "–" if value is None else f"{value:.3g}",
        "ratio": lambda value: "–" if value is None else f"{value:.3f}",
        "percent": lambda value: "–" if value is None else f"{value:.2%}",
        "signed": lambda value: "–" if value is None else f"{value:+.2f}".replace("-", "−"),
    }
    return templates


class WrappingName(str):
    """A name or a path that a browser may wrap behind its dots and slashes."""

    __slots__ = ()

    def __html__(self) -> str:
        """Return the name as markup."""
        return re.sub(PLACES, r"\g<0><wbr>", escape(printable(self)))


def draw_page(template: str, report: Report, command: str, **facts: Any) -> str:
    """Return the page of a report.

    Args:
        template: The file that fills the frame.
        report: The report; the template's variable of the same name.
        command: The command that makes the report; "" leaves it out.
        facts: Further variables of the template.
    """
    page = environment().get_template(template)
    kind = "verify outputs" if getattr(report, "level", None) == "outputs" else report.command
    terms = [(term, text) for term, text, pages in TERMS if kind in pages]
    return page.render(report=report, command=command, versions=versions(), terms=terms, **facts)


def versions() -> str:
    """Return the versions of this package, of Python and of the libraries that compute, in a line."""
    installed = (f"{name} {found}" for name in LIBRARIES if (found := _version(name)))
    ours = (f"dora-convert {__version__}", f"Python {platform.python_version()}")
    return " · ".join([*ours, *installed, f"{platform.system()} {platform.machine()}"])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def command_line(verb: str, refs: Sequence[str], group: type, options: Mapping[str, Any]) -> str:
    """Return the command of a verb with the options that differ from their defaults; tokens are left out."""
    words = ["dora-convert", verb, *refs]
    for name, (_, option) in options_of(group).items():
        given = options.get(name, option.default)
        if name in UNSAID or given == option.default:
            continue
        if isinstance(given, bool):
            words.append(flag(name) if given else flag(f"no_{name}"))
            continue
        for value in given if isinstance(given, list | tuple) else [given]:
            words += [flag(name), str(value)]
    return shlex.join(words)
