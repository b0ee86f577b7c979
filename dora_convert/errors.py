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
        print(error, error.hint)

A new class is added when a caller would handle it differently, not when a message differs. Keep them
picklable.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import ClassVar, NamedTuple


class Fault(NamedTuple):
    """One thing that is wrong: which tensor, file or field, and why."""

    what: str
    why: str


def _text(text: str) -> str:
    """Return text that any encoding takes: halves of surrogate pairs, from names of files, are escaped."""
    return text.encode(errors="backslashreplace").decode()


def _line(text: str, longest: int) -> str:
    """Return one line for a terminal: unprintable characters escaped, the middle of a long line left out."""
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def hint_of(error: OSError) -> str | None:
    """Return what to type after an error of the system, if something helps."""
    if error.errno == errno.EMFILE:
        return "this process may have more files open after: ulimit -n 1024"
    return None


def shown(value: object) -> str:
    """Return a value from a file as a message can hold it: on one line, and not too long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


class DoraConvertError(Exception):
    """The root: a message (what, where), optional faults, and an optional hint (what to type next)."""

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 2
    outcome: ClassVar[str] = "Nothing was written."

    def __init__(self, message: str, *, hint: str | None = None, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.faults = tuple(faults)

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


class UsageError(DoraConvertError, ValueError):
    """Options that contradict each other or the input."""

    kind = "usage"


class RefError(DoraConvertError, ValueError):
    """A BASE, ADAPTER or OUT that does not exist, or is something else."""

    kind = "reference"


class MalformedError(DoraConvertError, ValueError):
    """A file that breaks its own format."""

    kind = "malformed"


class UnsupportedError(DoraConvertError, NotImplementedError):
    """Something recognised and refused, by name, with the way out."""

    kind = "unsupported"


class PlanError(DoraConvertError, ValueError):
    """Base and adapter do not fit together; `faults` lists every reason."""

    kind = "plan"


class NumericalError(DoraConvertError, ArithmeticError):
    """NaN, Inf or overflow in a named tensor."""

    kind = "numerical"


class OutputError(DoraConvertError):
    """OUT exists, is in use, or cannot be written."""

    kind = "output"


class HubError(DoraConvertError):
    """The Hugging Face Hub refused or could not be reached."""

    kind = "hub"


class VerificationError(DoraConvertError):
    """Output that differs from what was computed; nothing is published."""

    kind = "verification"
    exit_code = 1
    outcome = "Nothing was published."


class InterruptedRunError(DoraConvertError):
    """Ctrl-C; only the command line raises it."""

    kind = "interrupted"
    exit_code = 130
    outcome = "Nothing was published."
