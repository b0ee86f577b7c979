"""Give Python the verbs of the command line: progress, notices and messages as Python has them.

`public` is the one place that knows of the difference. Below it, messages name options as on the command line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar, cast

from ..errors import DoraConvertError, Fault
from ..option_table import OPTIONS, Option
from .talk import ProgressBar, log
from .words import in_python

Verb = TypeVar("Verb", bound=Callable[..., Any])

PROGRESS = inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=True, annotation=bool)
PROGRESS_HELP = "Show a bar in notebooks and terminals, unless on_progress is given."


def public(verb: Verb) -> Verb:
    """Return a verb for Python: with a bar, with notices in the log `dora_convert`, and with all options explained."""
    signature = inspect.signature(verb)
    listed = _with_progress(signature)

    @wraps(verb)
    def spoken(*args: Any, **options: Any) -> Any:
        bar = ProgressBar()
        if "on_progress" in signature.parameters:
            on_notice = options.get("on_notice") or log
            options["on_notice"] = lambda text: on_notice(in_python(text))
            if options.pop("progress", True) and options.get("on_progress") is None:
                options["on_progress"] = bar.move
        with ExitStack() as stack:
            stack.enter_context(closing(bar))
            stack.enter_context(_in_python_words())
            result = verb(*args, **options)
            if isinstance(result, Iterator):
                return _resumed(result, stack.pop_all())
            return _said(result)

    spoken.__signature__ = listed  # type: ignore[attr-defined]
    spoken.__doc__ = f"{inspect.getdoc(verb)}\n\n{explained(listed)}"
    return cast("Verb", spoken)


def _with_progress(signature: inspect.Signature) -> inspect.Signature:
    """Return a verb's signature; verbs that take a while get `progress` before their callbacks."""
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        parameters += [PROGRESS, parameter] if name == "on_progress" else [parameter]
    return signature.replace(parameters=parameters)


def explained(signature: inspect.Signature) -> str:
    """Return the part of a docstring that explains the options, from the command line's own help."""
    lines = ["Options:"]
    for parameter in signature.parameters.values():
        option = Option(True, PROGRESS_HELP) if parameter.name == "progress" else OPTIONS.get(parameter.name)
        if option is None or parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        choices = f" One of {', '.join(map(repr, option.choices))}." if option.choices else ""
        default = f" Default {parameter.default!r}." if parameter.default not in (None, ()) else ""
        lines.append(f"    {parameter.name}: {in_python(option.help)}{choices}{default}")
    return "\n".join(lines)


def _resumed(values: Iterator[Any], stack: ExitStack) -> Iterator[Any]:
    """Yield values under the stack's contexts, which end with the values."""
    with stack:
        yield from values


@contextmanager
def _in_python_words() -> Iterator[None]:
    """Let errors name options as Python does."""
    try:
        yield
    except DoraConvertError as error:
        error.message = in_python(error.message)
        error.hint = error.hint and in_python(error.hint)
        error.faults = tuple(Fault(what, in_python(why)) for what, why in error.faults)
        raise


def _said(report: Any) -> Any:
    """Return a report whose warnings name options as Python does."""
    warnings = getattr(report, "warnings", ())
    said = tuple(map(in_python, warnings))
    return report if said == tuple(warnings) else replace(report, warnings=said)
