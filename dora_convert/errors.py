"""Define every error that this package raises, as one tree.

    DoraConvertError            exit code 2
    ├── UsageError              options that contradict each other or the input
    ├── RefError                a BASE, ADAPTER or OUT that does not exist, or is something else
    ├── MalformedError          a file that breaks its own format
    ├── UnsupportedError        recognised and refused: names the part and the way out
    ├── PlanError               base and adapter do not fit; carries every fault
    ├── NumericalError          NaN, Inf or overflow: names the tensor and the file at fault
    ├── OutputError             OUT exists, is locked, or cannot be written
    ├── HubError                the Hub refused or could not be reached
    ├── VerificationError       the output differs from what was computed; exit code 1
    └── InterruptedRunError     Ctrl-C on the command line; exit code 130

Catch `DoraConvertError` for all of them:

    try:
        dora_convert.merge(base, adapter, out)
    except dora_convert.DoraConvertError as error:
        print(error)  # the message, the faults and the hint

A new class is added when a caller would handle it differently, not when a message differs. Keep them
picklable.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

MORE_FILES = "ulimit -n 1024, then the same command"
"""The hint if a process may have no more files open."""


class Fault(NamedTuple):
    """One thing that is wrong: which tensor, file or field, and why."""

    what: str
    why: str


def _text(text: str) -> str:
    """Return text that any encoding takes: halves of surrogate pairs, from names of files, are escaped."""
    return text.encode(errors="backslashreplace").decode()


def printable(text: str) -> str:
    """Return text for a terminal: control characters, which names in files may hold, are escaped."""
    return re.sub(r"[^ -~]", lambda match: match[0] if match[0].isprintable() else ascii(match[0])[1:-1], text)


def _line(text: str, longest: int) -> str:
    """Return one line for a terminal, without the middle of a long one."""
    text = printable(text)
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def hint_of(error: OSError) -> str | None:
    """Return what to type after an error of the system, if something helps."""
    return MORE_FILES if error.errno in (errno.EMFILE, errno.ENFILE) else None


def shown(value: object) -> str:
    """Return a value from a file as a message can hold it: on one line, and not too long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


class DoraConvertError(Exception):
    """The root: a message (what, where), optional faults, and an optional hint (what to type next)."""

    kind: ClassVar[str] = "error"
    """The error's name in JSON."""
    exit_code: ClassVar[int] = 2
    outcome: str = "Nothing was written."
    """A sentence about OUT; empty if the message says it."""

    def __init_subclass__(cls, kind: str | None = None) -> None:
        cls.kind = kind or cls.kind

    def __init__(
        self, message: str, *, hint: str | None = None, faults: Sequence[Fault] = (), outcome: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.faults = tuple(faults)
        self.outcome = outcome or self.outcome

    def __str__(self) -> str:
        return self.text() + (f"\nHint: {printable(self.hint)}" if self.hint else "")

    def text(self, limit: int = 10) -> str:
        """Return the message and its faults, one a line, at most `limit` of them."""
        shown = [Fault(_line(what, 150), _line(why, 300)) for what, why in self.faults[:limit]]
        width = min(60, max((len(fault.what) for fault in shown), default=0))
        lines, last = [_line(self.message, 600)], None
        for what, why in shown:
            lines.append(f"  {what:{width}}  {'the same' if why == last and len(why) > 20 else why}")
            last = why
        if len(self.faults) > limit:
            lines.append(f"  … and {len(self.faults) - limit} more")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """Return the error as `--json` prints it, with all faults."""
        hint = _text(self.hint) if self.hint else None
        body: dict[str, object] = {"kind": self.kind, "message": _text(self.message), "hint": hint}
        if self.faults:
            body["faults"] = [{"what": _text(what), "why": _text(why)} for what, why in self.faults]
        return {"error": body}


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that a mistyped one is closest to, if one is close."""
    from difflib import get_close_matches

    names = {name.lower(): name for name in known}
    found = get_close_matches(word.lower(), names, 1)
    return names[found[0]] if found else None


@contextmanager
def noted(errors: list[tuple[str, DoraConvertError]], named: str) -> Iterator[None]:
    """Add an error of the block to a list, with its input's word and REF, instead of raising it."""
    try:
        yield
    except DoraConvertError as error:
        errors.append((named, error))


def together(errors: Sequence[tuple[str, DoraConvertError]], what: str = "inputs cannot be read") -> DoraConvertError:
    """Return the errors of several inputs as one; each comes with its input's word and REF, such as "BASE 'a'"."""
    if len(errors) == 1:
        return errors[0][1]
    faults, hints = list[Fault](), dict[str, None]()
    for named, error in errors:
        why = error.message.removeprefix(named).removeprefix(named.replace("'", ""))
        faults += [Fault(named, why.strip(" :").rstrip(".")), *error.faults]
        hints |= {error.hint.rstrip("."): None} if error.hint else {}
    kinds = {type(error) for _, error in errors}
    kind = kinds.pop() if len(kinds) == 1 else DoraConvertError
    return kind(f"{len(errors)} {what}.", faults=faults, hint="; ".join(hints).replace("?; ", "? ") or None)


class UsageError(DoraConvertError, ValueError, kind="usage"):
    """Options that contradict each other or the input."""


class RefError(DoraConvertError, ValueError, kind="reference"):
    """A BASE, ADAPTER or OUT that does not exist, or is something else."""


class MalformedError(DoraConvertError, ValueError, kind="malformed"):
    """A file that breaks its own format."""


class UnsupportedError(DoraConvertError, NotImplementedError, kind="unsupported"):
    """Something recognised and refused, by name, with the way out."""


class PlanError(DoraConvertError, ValueError, kind="plan"):
    """Base and adapter do not fit together; `faults` lists every reason."""


class NumericalError(DoraConvertError, ArithmeticError, kind="numerical"):
    """NaN, Inf or overflow in a named tensor."""


class OutputError(DoraConvertError, kind="output"):
    """OUT exists, is in use, or cannot be written."""


class HubError(DoraConvertError, kind="hub"):
    """The Hugging Face Hub refused or could not be reached."""


class VerificationError(DoraConvertError, kind="verification"):
    """Output that differs from what was computed; nothing is published."""

    exit_code = 1
    outcome = "Nothing was published."


class InterruptedRunError(DoraConvertError, kind="interrupted"):
    """Ctrl-C; only the command line raises it."""

    exit_code = 130
    outcome = "Nothing was published."
