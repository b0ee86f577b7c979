"""Match the patterns of PEFT's config with the names of modules, in bounded time.

Configs come with somebody's adapter. A table may have a key for each of thousands of modules, and a regular
expression may backtrack for ever.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from ...errors import MalformedError

Number = TypeVar("Number", int, float)

SECONDS = 5
"""The time that all doubtful patterns of a config may take together."""
FEW = 3
"""So many repeats, none of them around another one, take an acceptable time for names of modules."""

_PLAIN = re.compile(r"(\^?)((?:[\w-]|\\?\.|\\-)*)(\$?)")
"""A key that is a name: its dots, escaped or not, are the only special characters."""
_TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    match = re.compile(pattern).match
    for name in names:
        match(name)
    print("done", flush=True)
"""


class PatternTable(Generic[Number]):
    r"""The numbers of a `rank_pattern` or an `alpha_pattern`; the first key that matches a module counts.

    PEFT's rule is `(.*\.)?(key)$` for each key in the order of the file (get_pattern_key). Keys that are names
    are found by the ends of a module's name, so that only true regular expressions are tried one by one.
    """

    def __init__(self, numbers: Mapping[str, Number]) -> None:
        self._numbers: tuple[tuple[str, Number], ...] = tuple(numbers.items())
        self._ends: dict[tuple[str, tuple[int, ...]], int] = {}
        self._wholes: dict[tuple[str, tuple[int, ...]], int] = {}
        self._wildcards: dict[int, set[tuple[int, ...]]] = {}
        """By a key's length, the positions of dots that stand for any character."""
        self._regexes: list[tuple[int, re.Pattern[str]]] = []
        for position, key in enumerate(numbers):
            if plain := _PLAIN.fullmatch(key):
                name = _name(plain[2])
                self._wildcards.setdefault(len(name[0]), set()).add(name[1])
                (self._wholes if plain[1] else self._ends).setdefault(name, position)
            else:
                self._regexes.append((position, re.compile(as_key(key))))

    def find(self, module: str, default: Number) -> tuple[Number, str]:
        """Return a module's number and its key; the default and "" if no key matches."""
        first = min(self._positions(module), default=len(self._numbers))
        for position, regex in self._regexes:
            if position < first and regex.match(module):
                first = position
        if first == len(self._numbers):
            return default, ""
        key, number = self._numbers[first]
        return number, key

    def _positions(self, module: str) -> Iterator[int]:
        """Yield the positions of the keys that are a module's name, or an end of it."""
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", module))]
        for start in starts:
            end = module[start:]
            for wildcards in self._wildcards.get(len(end), ()):
                name = "".join("." if at in wildcards else char for at, char in enumerate(end)), wildcards
                yield from (table[name] for table in (self._ends, self._wholes)[: 1 if start else 2] if name in table)


def _name(text: str) -> tuple[str, tuple[int, ...]]:
    """Return the characters of a plain key, and the positions of its dots that stand for any character."""
    characters = re.findall(r"\\?.", text)
    wildcards = tuple(at for at, char in enumerate(characters) if char == ".")
    return "".join(char[-1] for char in characters), wildcards


def as_key(key: str) -> str:
    """Return the expression that PEFT makes of a key of a table."""
    return rf"(.*\.)?({key})$"


def refuse_slow(patterns: Iterable[tuple[str, str, str]], names: Collection[str]) -> None:
    """Raise MalformedError if a pattern cannot be matched with all names in a few seconds.

    `patterns` holds each pattern's field, its text in the config, and the expression to match. Python's engine
    cannot be interrupted in a thread, so doubtful patterns are tried in a process of their own.
    """
    doubtful = [each for each in patterns if _is_doubtful(each[1])]
    if not doubtful:
        return
    question = json.dumps([[expression for _, _, expression in doubtful], sorted(names)])
    command = [sys.executable, "-I", "-c", _TRIAL]
    try:
        subprocess.run(  # noqa: S603 - our own program; the patterns are its input
            command, input=question.encode(), capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        field, pattern, _ = doubtful[(error.stdout or b"").count(b"done")]
        raise MalformedError(
            f"adapter_config.json: the pattern {pattern[:200]} of {field} takes too long to match.",
            hint="write it without a repeat inside a repeat",
        ) from error


def _is_doubtful(pattern: str) -> bool:
    """Return True unless a pattern has few repeats, and none of a group."""
    text = re.sub(r"\\.|\[[^]]*\]", "x", pattern)
    repeats = re.findall(r"(?<!\()[*+?{]", re.sub(r"([*+?}])[?+]", r"\1", text))
    return len(repeats) > FEW or re.search(r"\)[*+{]|\(\?[P(]", text) is not None
