"""Turn the options in a message from the command line's words into Python's: `--dtype float32` is `dtype='float32'`."""

from __future__ import annotations

import re
from functools import cache

from ..option_table import OPTIONS
from ..options import flag

COMMAND = re.compile(r"dora-convert [a-z-]+[^;]*")
"""A command to type, which stays as it is."""
SIZE = r"\d[\d.]*(?: ?[kKMGT]?i?B\b)?"
NAMED = r"'[^']*'|\"[^\"]*\"|[A-Z_]{3,}(?:/[A-Z_]+)*\b"
"""A quoted value, or a value's name such as REPO_ID."""
ODD = r"[^\s,;:]*[/*?_.\d][^\s,;:]*[^\s,;:.]"
"""A word that prose does not have: a path, a pattern, a number."""


@cache
def _pattern() -> re.Pattern[str]:
    """Return a pattern of every option with its value, the longest names first."""
    words = []
    for name, option in sorted(OPTIONS.items(), key=lambda entry: -len(entry[0])):
        if isinstance(option.default, bool):
            words.append(f"{flag(name)}|{flag(f'no_{name}')}")
            continue
        choices = "".join(f"{re.escape(choice)}\\b|" for choice in option.choices)
        device = r"cuda(?::\d+(?:,(?:cuda:)?\d+)*)?\b|cpu(?:,cpu)*\b|mps\b|auto\b|" if name == "device" else ""
        globs = r"\S+(?= matches)|" if option.metavar == "GLOB" else ""
        words.append(f"{flag(name)}(?:[ =](?:{choices}{device}{globs}{NAMED}|{SIZE}|{ODD}))?")
    return re.compile(rf"(?<![\w-])(?:{'|'.join(words)})(?![\w-])")


def in_python(text: str) -> str:
    """Return a message with its options in Python's words; commands to type stay as they are."""
    if "--" not in text:
        return text
    parts, end = [], 0
    for command in COMMAND.finditer(text):
        parts += [_pattern().sub(_keyword, text[end : command.start()]), command[0]]
        end = command.end()
    return "".join([*parts, _pattern().sub(_keyword, text[end:])])


def _keyword(match: re.Match[str]) -> str:
    """Return an option of the command line as a keyword of Python."""
    word, _, value = match[0].partition(" ")
    name = word.removeprefix("--").replace("-", "_")
    if name.startswith("no_") and name not in OPTIONS:
        return f"{name.removeprefix('no_')}=False"
    if isinstance(OPTIONS[name].default, bool):
        return f"{name}=True"
    quoted = value[:1] in "'\"" or _is_number(value)
    return f"{name}={value if quoted else repr(value)}"


def _is_number(value: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", value) is not None
