"""What a JSON value must be like, said as a value: forms, and where something is not of its form.

int, bool, dict, list           a value of just this type
str                             a text, of whole characters
float                           a finite number
count                           a number of elements or bytes
None                            null
{"name": form, "other?": form}  an object with these fields, the latter perhaps, and any others
{str: form}                     an object of any keys; `str`, or what else stands there, is their form
[form]                          a list
(form, form)                    a list of so many
{"one", "other"}                one of these texts
Either(form, form)              either
a function                      what it is true of
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LARGEST = 1e300
"""More is no number that anything here can be."""


def count(value: object) -> bool:
    """Whether a value is a number of elements or bytes."""
    return type(value) is int and 0 <= value < 2**60


class Either:
    """One form or another."""

    def __init__(self, *forms: Any) -> None:
        self.forms = forms


def misfit(value: Any, form: Any) -> str | None:
    """The way to the first part of a value that is not of its form; None where all of it is."""
    return next(_misfits(value, form, ""), None)


def _misfits(value: Any, form: Any, where: str) -> Iterator[str]:
    if isinstance(form, Mapping):
        yield from _of_object(value, form, where)
    elif isinstance(form, list):
        yield from _of_list(value, form * len(value) if isinstance(value, list) else form, where)
    elif isinstance(form, tuple):
        yield from _of_list(value, list(form), where)
    elif not _is(value, form):
        yield where or "all of it"


def _of_object(value: Any, form: Mapping[Any, Any], where: str) -> Iterator[str]:
    if type(value) is not dict:
        yield where or "all of it"
        return
    for key, inner in form.items():
        if not isinstance(key, str):
            for name, item in value.items():
                yield from _misfits(name, key, f"{where}/{name}")
                yield from _misfits(item, inner, f"{where}/{name}")
            continue
        name = key.removesuffix("?")
        if name in value:
            yield from _misfits(value[name], inner, f"{where}/{name}")
        elif name == key:
            yield f"{where}/{name}"


def _of_list(value: Any, forms: list[Any], where: str) -> Iterator[str]:
    if type(value) is not list or len(value) != len(forms):
        yield where or "all of it"
        return
    for number, (item, form) in enumerate(zip(value, forms, strict=True)):
        yield from _misfits(item, form, f"{where}/{number}")


def _is(value: Any, form: Any) -> bool:
    if form is None:
        return value is None
    if isinstance(form, Either):
        return any(misfit(value, one) is None for one in form.forms)
    if isinstance(form, (set, frozenset)):
        return type(value) is str and value in form
    if form is float:
        return type(value) in (int, float) and abs(value) < LARGEST
    if form is str:
        return type(value) is str and not any("\ud800" <= char <= "\udfff" for char in value)
    return type(value) is form if isinstance(form, type) else bool(form(value))
