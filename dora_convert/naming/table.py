"""Read the table of families: the rules by which transformers gives names in a model to tensors of a checkpoint.

`families.json` is written by `tests/make_families.py`. Its rules are picked by a config's `architectures`,
`model_type` and inner configs, for the model and for each model inside it. Nothing of transformers is needed.

A rule is a list: expressions for a stored name, the names that take the match's place, and operations. A rule without
operations renames. All renames are tried in order; then at most one rule with operations (`core_model_loading`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parent / "families.json"
_NUMBER = re.compile(r"(?<=\.)\d{2,}(?=\.)")
"""A part of a name that is a number of two digits or more: rules treat all of these alike."""
_WHOLE = re.compile(r"(?<![^.])\d+(?![^.])")
_FIRST, _MOST = 10**9, 8
_STAND_INS = tuple(str(_FIRST + k) for k in range(_MOST))
"""Numbers that stand for others while rules are tried."""
Config = Mapping[str, Any]


@cache
def read_table() -> Mapping[str, Any]:
    """Return the table of families."""
    table: Mapping[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return table


@dataclass(frozen=True)
class Scope:
    """The part of a model that a rule is for: the model's own prefix, and a path inside the model."""

    prefix: str = ""  # with its last dot
    path: str | None = None  # with its last dot; None for the whole model

    def split(self, name: str) -> tuple[str, str] | None:
        """Return a name's beginning and the rest that a rule is for; None outside of the scope."""
        if self.path is None:
            return "", name
        start = next((start for start in (self.prefix + self.path, self.path) if name.startswith(start)), None)
        return None if start is None else (start, name[len(start) :])


@dataclass(frozen=True, eq=False)
class Rule:
    """One of transformers' rules, and the part of the model that it is for."""

    pattern: re.Pattern[str]
    numbers: tuple[int, ...]
    """For each group of the pattern, in the order of trial, the position of its source."""
    targets: tuple[str, ...]
    operations: tuple[str, ...]
    scope: Scope

    @property
    def converts(self) -> bool:
        """True if the rule rearranges tensors."""
        return bool(self.operations) and self.operations != ("group",) and not self.offset

    @property
    def offset(self) -> int:
        """The number that a rename adds to the first number of a name."""
        word, _, number = self.operations[0].partition(" ") if self.operations else ("", "", "")
        return int(number) if word == "offset" else 0

    def apply(self, name: str, seen: set[Rule]) -> tuple[str, int] | None:
        """Return the name in the model and the source's position; None if the rule is not for the name.

        Rules of a group count once the group's first source was `seen`.
        """
        split = self.scope.split(name)
        match = split and self.pattern.search(split[1])
        if not split or not match:
            return None
        group = next(group for group in match.groupdict().items() if group[1] is not None)[0]
        position, first = int(group[1:]), self.pattern.groupindex[group]
        target = self.targets[0]
        if self.operations == ("group",):
            if position and self not in seen:
                return None
            seen.add(self)
            target = self.targets[position]
        if r"\1" in target:
            inner = match.group(first + 1)
            target = target.replace(r"\1", str(int(inner) + self.offset) if self.offset else inner)
        return split[0] + split[1].replace(match.group(0), target, 1), position


class Place(NamedTuple):
    """The place in the model of a stored tensor."""

    name: str
    rule: Rule | None = None
    """The rule that rearranges the tensor; None for a tensor that only has another name."""
    source: int = 0
    """The position of the tensor among the rule's sources."""
    lost: tuple[int, ...] = ()
    """The numbers in the stored name that the name in the model lacks, such as an expert's."""


@dataclass
class Family:
    """The rules for one checkpoint."""

    name: str
    """The class of the model, or its model type."""
    rules: tuple[Rule, ...]
    prefix: str = ""
    """The base model's name inside a model with a head."""
    tops: tuple[str, ...] = ()
    """The first names of the model's tensors; empty if they are not known."""
    fixed: frozenset[str] = frozenset()
    """Names in the model, with `*` for numbers, that rules would change once more."""
    _seen: set[Rule] = field(default_factory=set)
    _kinds: dict[str, Place] = field(default_factory=dict)

    @cached_property
    def _counts(self) -> bool:
        """True if a rule changes numbers."""
        return any(rule.offset for rule in self.rules)

    def notice(self, names: Iterable[str]) -> None:
        """Take note of all names of a checkpoint, on which some rules depend."""
        if any(rule.operations == ("group",) for rule in self.rules):
            for kind in {_NUMBER.sub("10", name) for name in names}:
                self._place(kind)
        self._kinds.clear()

    def place(self, name: str) -> Place:
        """Return the place in the model of a stored name."""
        numbers = _NUMBER.findall(name)
        if not numbers or self._counts or len(numbers) > _MOST:
            return self._place(name)
        kind = name
        for k, number in enumerate(numbers):
            kind = kind.replace(f".{number}.", f".{_STAND_INS[k]}.", 1)
        if not (found := self._kinds.get(kind)):
            found = self._kinds[kind] = self._place(kind)
        own = found.name
        for k, number in enumerate(numbers):
            own = own.replace(_STAND_INS[k], number, 1)
        lost = tuple(int(numbers[n - _FIRST]) if n >= _FIRST else n for n in found.lost) if found.lost else ()
        return Place(own, found.rule, found.source, lost)

    def _place(self, name: str) -> Place:
        if self.fixed and _WHOLE.sub("*", name) in self.fixed:
            return Place(name)
        renamed, rule, source = name, None, 0
        for each in self.rules:
            if not each.converts and (found := each.apply(renamed, self._seen)):
                renamed = found[0]
        for each in self.rules:
            if each.converts and (found := each.apply(renamed, self._seen)):
                (renamed, source), rule = found, each
                break
        lost = Counter(_numbers(name)) - Counter(_numbers(renamed)) if rule else Counter()
        return Place(self.with_prefix(renamed), rule, source, tuple(lost.elements()))

    def with_prefix(self, name: str) -> str:
        """Return a name with the base model's prefix added or taken away, as the model's first names say."""
        top, _, rest = name.partition(".")
        inner = rest.partition(".")[0]
        if not self.prefix or not self.tops:
            return name
        if top == self.prefix and inner != self.prefix and inner in self.tops:
            return rest
        return f"{self.prefix}.{name}" if self.prefix in self.tops and top not in self.tops else name


def _numbers(name: str) -> Iterator[int]:
    return (int(part) for part in name.split(".") if part.isdigit())


def family_of(config: Config) -> Family | None:
    """Return the rules for a checkpoint with a config; None if the table does not know the model.

    A model that brings its own code is known only by its class.
    """
    table, kind = read_table(), config.get("model_type")
    name = _class_of(config, table)
    if not name and ("auto_map" in config or kind not in table["rules"]):
        return None
    prefix, tops, _ = table["models"].get(name, ("", (), ()))
    rules: list[Rule] = []
    claimed: dict[str, list[str]] = {}
    for path, own, own_type in _models(name, str(kind), config, table):
        if (listed := _listed(path, own, own_type, claimed, table)) is None:
            continue
        inner = path.removeprefix(prefix).removeprefix(".")
        scope = Scope(prefix and f"{prefix}.", inner and f"{inner}.") if path else Scope()
        rules += (_rule(written, scope) for written in listed)
    rules += (_rule(written, Scope()) for written in table["rules"]["legacy"])
    fixed = frozenset(table["fixed"].get(name, ()))
    return Family(name or str(kind), tuple(rules), prefix, tuple(tops), fixed)


def _class_of(config: Config, table: Mapping[str, Any]) -> str:
    """Return the class of a config's model; else the usual class of its model type; else ""."""
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    kind = config.get("model_type")
    usual = None if "auto_map" in config else table["usual"].get(kind) or table["bare"].get(kind)
    return next((name for name in names if name in table["models"]), None) or usual or ""


def _models(
    name: str, kind: str, config: Config, table: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, ...]]:
    """Yield the path, the class and the model type of a model and of each model inside it, outer ones first."""
    yield path, name, kind
    for inner, usual, key, usual_type in table["models"].get(name, ("", (), ()))[2]:
        own = config.get(key) if key else config
        own = own if isinstance(own, Mapping) else {}
        own_type = own.get("model_type", usual_type) if key else kind
        other = own_type != usual_type and key and table["bare"].get(own_type)
        yield from _models(other or usual, str(own_type), own, table, f"{path}.{inner}".removeprefix("."))


def _listed(
    path: str, name: str, kind: str, claimed: dict[str, list[str]], table: Mapping[str, Any]
) -> list[list[Any]] | None:
    """Return the written rules of a model at a path; None if it has none, or an outer model has them already."""

    def is_claimed(identifier: str) -> bool:
        return any(not outer or path.startswith(f"{outer}.") for outer in claimed.get(identifier, ()))

    rules = table["rules"]
    if is_claimed(name) or (name not in rules and (kind not in rules or is_claimed(kind))):
        return None
    for identifier in (name,) if name in rules else (name, kind):
        claimed.setdefault(identifier, []).append(path)
    listed = rules[name if name in rules else kind]
    return rules[listed] if isinstance(listed, str) else listed  # type: ignore[no-any-return] # JSON


def _rule(written: list[Any], scope: Scope) -> Rule:
    """Return a written rule."""
    sources = written[0] if isinstance(written[0], list) else [[0, written[0]]]
    targets = written[1] if isinstance(written[1], list) else [written[1]]
    pattern = re.compile("|".join(f"(?P<g{position}>{source})" for position, source in sources))
    operations = written[2] if len(written) > 2 else ()  # a rule without operations has two parts
    return Rule(pattern, tuple(position for position, _ in sources), tuple(targets), tuple(operations), scope)
