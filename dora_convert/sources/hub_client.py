"""What the Hub answers, in our words: its errors explained, and calls tried again where that can help.

huggingface_hub tries some requests again by itself, and not others; `patiently` is for those others.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from ..errors import DoraConvertError, HubError, RefError
from ..storage.refs import HubRef

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

PASSING = (429, 500, 502, 503, 504)
"""Status codes of servers that may answer otherwise in a moment."""
CUT = ("RemoteProtocolError", "ReadError", "WriteError", "ReadTimeout", "ChunkedEncodingError")
"""What HTTP libraries call a connection that was there and broke."""
WAITS = (0.5, 1.0, 2.0, 4.0)
LONGEST_WAIT = 60.0

Value = TypeVar("Value")


def patiently(call: Callable[[], Value]) -> Value:
    """What a call returns; tried again, some seconds later, while the Hub is busy or a connection breaks."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:  # noqa: PERF203 - a request, not a loop
            asked = _asked_to_wait(error)
            if asked is None:
                raise
            time.sleep(max(wait, min(asked, LONGEST_WAIT)))
    return call()


def _asked_to_wait(error: Exception) -> float | None:
    """Seconds that a passing fault asks to wait for, mostly none; None where it will not pass."""
    cause = root_of(error)
    if type(cause).__name__ in CUT:
        return 0.0
    if status_of(cause) not in PASSING:
        return None
    headers = cause.response.headers  # type: ignore[attr-defined]
    with contextlib.suppress(TypeError, ValueError):
        return float(headers.get("Retry-After"))
    return 0.0


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error of huggingface_hub's, if it has one."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def root_of(error: BaseException) -> BaseException:
    """What is behind an error: uploads wrap what went wrong with a file, downloads say that the cache has none."""
    while (
        type(error) is RuntimeError or type(error).__name__ == "LocalEntryNotFoundError"
    ) and error.__cause__:
        error = error.__cause__
    return error


def unreachable() -> tuple[type[Exception], ...]:
    """What huggingface_hub lets through when there is no connection: its HTTP library's errors, whichever that is."""
    from huggingface_hub.errors import HfHubHTTPError

    foreign: list[type[Exception]] = [
        base
        for base in HfHubHTTPError.__mro__
        if issubclass(base, Exception)
        and base.__module__.partition(".")[0] not in ("builtins", "huggingface_hub")
    ]
    return (ConnectionError, TimeoutError, *foreign)


@contextmanager
def explained(ref: HubRef, what: str) -> Iterator[None]:
    """Turn what goes wrong while reading a repo into our errors."""
    from huggingface_hub import errors

    refusals: tuple[type[Exception], ...] = (errors.HfHubHTTPError, errors.EntryNotFoundError, *unreachable())
    try:
        yield
    except errors.HFValidationError as error:
        raise _no_name(ref, what) from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"{what} {ref} is gated.", hint="ask for access on its page, then hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{what} {ref} is neither a local path nor a repo on the Hub that you may see.",
            hint="check the spelling; for a private repo, hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{what} {ref}: the repo has no revision {ref.revision}.") from error
    except errors.RemoteEntryNotFoundError as error:
        raise HubError(f"{what} {ref}: a file is missing there: {_file_of(error)}.") from error
    except refusals as error:
        raise _refused(f"{what} {ref}", root_of(error), writing=False) from error


@contextmanager
def explained_writing(repo: str) -> Iterator[None]:
    """Turn what goes wrong while writing to a repo into our errors."""
    from huggingface_hub import errors

    refusals: tuple[type[Exception], ...] = (errors.HfHubHTTPError, RuntimeError, ValueError, *unreachable())
    try:
        yield
    except DoraConvertError:
        raise
    except errors.HFValidationError as error:
        raise _no_name(repo, "REPO_ID") from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError("There is no Hub token.", hint="hf auth login, or HF_TOKEN") from error
    except refusals as error:
        raise _refused(repo, root_of(error), writing=True) from error


def _no_name(ref: object, what: str) -> RefError:
    return RefError(f"{what} {ref} is no name of a repo.", hint="a Hub repo is written org/name")


def _refused(where: str, error: BaseException, *, writing: bool) -> HubError:
    """One sentence on what the Hub said, and what to do about it."""
    status = status_of(error)
    said = _said(error)
    login = "hf auth login, with a token that may write" if writing else "hf auth login"
    known = {
        401: ("the Hub wants to know who you are", login),
        402: ("the Hub asks for payment or more space", "free some space, or see the plan of your account"),
        403: (f"the Hub does not let you {'write' if writing else 'read'} there", login),
        404: ("there is no such repo, or you may not see it", f"check the spelling; {login}"),
        409: ("the name is taken", "choose another name"),
        412: ("the repo has changed meanwhile", "the same command goes on from where it was"),
        413: ("too large for the Hub", "free some space, or cut it smaller with --max-shard-size"),
        429: ("too many requests", "wait some minutes; the same command goes on from where it was"),
    }
    if status in known:
        text, hint = known[status]
    elif status and status >= 500:
        text, hint = f"the Hub is in trouble ({status})", "later, the same command goes on from where it was"
    elif status is None and _is_offline(error):
        text, hint = "offline mode is on", "unset HF_HUB_OFFLINE"
    elif status is None and isinstance(error, unreachable()):
        text, hint = "the Hub cannot be reached, or the connection broke", "check the connection, and again"
    else:
        text, hint = "the Hub answered", ""
    return HubError(f"{where}: {text}{f': {said}' if said else '.'}", hint=hint or None)


def _file_of(error: HfHubHTTPError) -> str:
    """The path in the repo that was asked for."""
    return str(error.response.url).partition("/resolve/")[2].partition("/")[2] or "its name is not told"


def _is_offline(error: BaseException) -> bool:
    return type(error).__name__ == "OfflineModeIsEnabled"


def _said(error: BaseException) -> str:
    """The server's own words, or the error's last line."""
    words = getattr(error, "server_message", None) or ("" if status_of(error) else str(error))
    lines = [line.strip() for line in str(words).splitlines() if line.strip()]
    return "; ".join(lines[:3])


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep huggingface_hub's progress bars down: there is one bar, and it is ours."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
