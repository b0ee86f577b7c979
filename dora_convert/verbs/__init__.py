"""Carry out the verbs of the command line, one file or folder each; `takes` gives a verb its options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import Parameter, signature
from numbers import Real
from typing import Any, TypeVar, cast, get_args

from ..errors import UsageError, closest, printable
from ..option_table import Option
from ..options import SHORT_NAMES, flag, options_of

Verb = TypeVar("Verb", bound=Callable[..., Any])


def takes(group: type) -> Callable[[Verb], Verb]:
    """Return a decorator that gives a function the options of a group as keywords.

    The function is called with a value for every option. A keyword that is not in the group raises TypeError.
    """
    declared = options_of(group)
    keywords = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=option.default, annotation=kind)
        for name, (kind, option) in declared.items()
    ]

    def decorate(verb: Verb) -> Verb:
        plain = signature(verb)
        listed = plain.replace(parameters=[*list(plain.parameters.values())[:-1], *keywords])

        @wraps(verb)
        def complete(*args: Any, **options: Any) -> Any:
            _refuse_unknown(verb.__name__, options, listed.parameters)
            try:
                bound = listed.bind(*args, **options)
            except TypeError as error:
                raise TypeError(f"{verb.__name__}() {error}") from None
            bound.apply_defaults()
            for name, (kind, option) in declared.items():
                bound.arguments[name] = _given(name, bound.arguments[name], kind, option)
            return verb(*bound.args, **bound.kwargs)

        complete.__signature__ = listed  # type: ignore[attr-defined]
        return cast("Verb", complete)

    return decorate


def _refuse_unknown(verb: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for a keyword that a verb does not take, with the closest one that it takes."""
    names = [*known, "progress"]
    for name in options:
        if name not in names:
            meant = closest(name, names)
            advice = f"; did you mean {meant!r}?" if meant else f"; help(dora_convert.{verb}) lists the options"
            raise TypeError(f"{verb}() got an unexpected keyword argument {name!r}{advice}")


def _given(name: str, value: Any, kind: Any, option: Option) -> Any:
    """Return an option's value as the verbs expect it; UsageError for a value of another kind.

    A lone text or number is a list of one, and an object of torch is its name. Notices are printable.
    """
    if option.default == ():
        return _listed(name, value, float if float in get_args(kind) else str)
    if name == "on_notice" and value:
        return lambda text: value(printable(text))
    if name == "device" and isinstance(value, Iterable) and not isinstance(value, str | bytes):
        value = ",".join(map(str, value))
    if value is None or not (option.choices or name == "device"):
        return value
    word = str(value).removeprefix("torch.")
    word = SHORT_NAMES.get(word, word)
    if option.choices and word not in option.choices:
        meant = closest(word, [*option.choices, *SHORT_NAMES])
        hint = f"did you mean {meant}?" if meant else None
        raise UsageError(f"{flag(name)} {value!r} is not one of {', '.join(option.choices)}.", hint=hint)
    return word


def _listed(name: str, value: Any, kind: type[str | float]) -> tuple[Any, ...]:
    """Return the value of an option that takes several, as a tuple of texts or of numbers."""
    values = (value,) if isinstance(value, str | bytes) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(each, str if kind is str else Real) for each in values):
        raise UsageError(f"{flag(name)} {value!r} is not {'text' if kind is str else 'a number'}, or a list of such.")
    return values
