"""Call the Hub: explain its errors in our words, and retry calls where a retry can help.

huggingface_hub retries some requests by itself; `with_retries` is for the other ones.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ..errors import DoraConvertError, HubError, RefError, hint_of
from ..storage.refs import HubRef

TEMPORARY = (429, 500, 502, 503, 504)
"""Status codes of temporary failures."""
BROKEN = ("RemoteProtocolError", "ReadError", "WriteError", "ReadTimeout", "ChunkedEncodingError")
"""Names of the HTTP libraries' errors for a connection that broke."""
WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each retry."""
LONGEST_WAIT = 60.0

Value = TypeVar("Value")


def with_retries(call: Callable[[], Value]) -> Value:
    """Return the result of a call; retry after a pause while the Hub is busy or a connection breaks."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:  # noqa: PERF203 - a request, not a loop
            requested = _requested_wait(error)
            if requested is None:
                raise
            time.sleep(max(wait, min(requested, LONGEST_WAIT)))
    return call()


def _requested_wait(error: Exception) -> float | None:
    """Return the seconds that a temporary failure asks to wait, 0 by default; None for other errors."""
    cause = root_of(error)
    if type(cause).__name__ in BROKEN:
        return 0.0
    if status_of(cause) not in TEMPORARY:
        return None
    with contextlib.suppress(TypeError, ValueError):
        return float(cause.response.headers.get("Retry-After"))  # type: ignore[attr-defined]
    return 0.0


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error of huggingface_hub, if it has one."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def root_of(error: BaseException) -> BaseException:
    """Return the cause of an error: uploads wrap a file's error, downloads report a missing cache entry."""
    while (type(error) is RuntimeError or type(error).__name__ == "LocalEntryNotFoundError") and error.__cause__:
        error = error.__cause__
    return error


def connection_errors() -> tuple[type[Exception], ...]:
    """Return the errors that huggingface_hub raises without a connection: those of its HTTP library, too."""
    from huggingface_hub.errors import HfHubHTTPError

    foreign: list[type[Exception]] = [
        base
        for base in HfHubHTTPError.__mro__
        if issubclass(base, Exception) and base.__module__.partition(".")[0] not in ("builtins", "huggingface_hub")
    ]
    return (ConnectionError, TimeoutError, *foreign)


@contextmanager
def reading_errors(ref: HubRef, what: str) -> Iterator[None]:
    """Turn errors of reading a repo into our errors."""
    from huggingface_hub import errors

    refusals: tuple[type[Exception], ...] = (errors.HfHubHTTPError, errors.EntryNotFoundError, *connection_errors())
    try:
        yield
    except errors.HFValidationError as error:
        raise _invalid_name(ref, what) from error
    except errors.GatedRepoError as error:
        raise HubError(f"{what} {ref} is gated.", hint="ask for access on its page, then hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{what} {ref} is neither a local path nor a repo on the Hub that you may see.",
            hint="check the spelling; for a private repo, hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{what} {ref}: revision {ref.revision} not found.") from error
    except errors.RemoteEntryNotFoundError as error:
        path = str(error.response.url).partition("/resolve/")[2].partition("/")[2] or "unknown name"
        raise HubError(f"{what} {ref}: file not found in the repo: {path}.") from error
    except refusals as error:
        raise _refusal(f"{what} {ref}", root_of(error), writing=False) from error
    except OSError as error:
        if not _is_of_cache(error):
            raise
        raise HubError(
            f"{what} {ref} cannot be kept in {error.filename or 'the cache'}: {error.strerror or error}.",
            hint=hint_of(error) or "HF_HOME names the cache's folder; --no-cache keeps nothing there",
        ) from error


def _is_of_cache(error: OSError) -> bool:
    """Return True if an error is of the Hub's cache: of a path there, or of a full disk."""
    from huggingface_hub import constants

    return error.errno == errno.ENOSPC or str(error.filename).startswith((constants.HF_HOME, constants.HF_HUB_CACHE))


@contextmanager
def writing_errors(repo: str) -> Iterator[None]:
    """Turn errors of writing to a repo into our errors."""
    from huggingface_hub import errors

    refusals: tuple[type[Exception], ...] = (errors.HfHubHTTPError, RuntimeError, ValueError, *connection_errors())
    try:
        yield
    except DoraConvertError:
        raise
    except errors.HFValidationError as error:
        raise _invalid_name(repo, "REPO_ID") from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError("Hub token not found.", hint="hf auth login, or HF_TOKEN") from error
    except refusals as error:
        raise _refusal(repo, root_of(error), writing=True) from error


def refuse_unknown(repo: str) -> None:
    """Raise HubError if the Hub does not know this machine's token, with which a repo is to be written."""
    from huggingface_hub import HfApi

    with writing_errors(repo):
        with_retries(HfApi().whoami)


def _invalid_name(ref: object, what: str) -> RefError:
    return RefError(f"{what} {ref} is not a valid repo id.", hint="a Hub repo is written org/name")


def _refusal(subject: str, error: BaseException, *, writing: bool) -> HubError:
    """Return an error with the Hub's answer in one sentence and a hint."""
    status, words = status_of(error), _server_words(error)
    login = "hf auth login, with a token that may write" if writing else "hf auth login"
    resume = "rerun the same command to resume"
    known = {
        401: ("the Hub does not know who you are", login),
        402: ("the Hub asks for payment or more space", "free some space, or see the plan of your account"),
        403: (f"the Hub does not let you {'write to' if writing else 'read'} this repo", login),
        404: ("the repo does not exist, or you may not see it", f"check the spelling; {login}"),
        409: ("the name is taken", "choose another name"),
        412: ("the repo has changed meanwhile", resume),
        413: ("too large for the Hub", "free some space, or cut it smaller with --max-shard-size"),
        429: ("too many requests", f"wait some minutes; {resume}"),
    }
    if status in known:
        text, hint = known[status]
    elif status and status >= 500:
        text, hint = f"the Hub has a failure ({status})", f"later, {resume}"
    elif status is None and type(error).__name__ == "OfflineModeIsEnabled":
        text, hint = "offline mode is on", "unset HF_HUB_OFFLINE"
    elif status is None and isinstance(error, connection_errors()):
        text, hint = "the Hub cannot be reached, or the connection broke", "check the connection, then rerun"
    else:
        text, hint = "the Hub answered", ""
    return HubError(f"{subject}: {text}{f': {words}' if words else '.'}", hint=hint or None)


def _server_words(error: BaseException) -> str:
    """Return the server's message, or the error's first lines."""
    words = getattr(error, "server_message", None) or ("" if status_of(error) else str(error))
    lines = [line.strip() for line in str(words).splitlines() if line.strip()]
    return "; ".join(lines[:3])


@contextmanager
def without_bars() -> Iterator[None]:
    """Turn off huggingface_hub's progress bars while the block runs: the only bar is ours."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
