"""push where the Hub says no, or not now."""

from __future__ import annotations

import pytest

from .test_push import commits, made, merged, push  # noqa: F401 - fixtures
from .toy import contents

COMMIT = "POST .*/commit/"


@pytest.mark.parametrize(
    ("pattern", "status", "how", "message"),
    [
        ("POST /api/repos/create", 401, {}, "does not know who you are"),
        ("POST /api/repos/create", 403, {"message": "no rights in this namespace"}, "no rights in this namespace"),
        (".*", 401, {"times": 99}, "hf auth login"),
        ("objects/batch", 403, {}, "does not let you write to this repo"),
        ("objects/batch", 402, {"message": "private storage is full"}, "private storage is full"),
        ("PUT", 413, {}, "too large for the Hub"),
        (COMMIT, 403, {"message": "this token may only read"}, "this token may only read"),
        (COMMIT, 412, {}, "has changed meanwhile"),
        (COMMIT, 400, {"message": "bad file"}, "bad file"),
        (COMMIT, 503, {"times": 99}, "the Hub has a failure (503)"),
    ],
)
def test_refused(hub, push, merged, pattern, status, how, message):
    """A refusal of the Hub is one message with exit code 2, and nothing is committed."""
    hub.fail(pattern, status, **how)
    done = push(merged, "me/merged")
    assert done.returncode == 2
    assert message in done.stderr, done.stderr
    assert "me/merged" not in hub.state or commits(hub, "me/merged") == 0


def test_names_that_are_taken_or_none(hub, push, merged):
    """A repo of another type under the name, no name at all, DIR and REPO_ID exchanged, no connection, offline."""
    hub.taken.add("me/data")
    cases = [
        (("me/data",), {}, "me/data exists, but not as a model"),
        (("a/b/c",), {}, "a/b/c is not a valid repo id"),
        (("me/m",), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub cannot be reached"),
        (("me/m",), {"HF_HUB_OFFLINE": "1"}, "offline mode is on"),
        (("me/m", "--base-model", "./base"), {}, "--base-model './base' is not a valid repo id"),
    ]
    for words, environment, message in cases:
        done = push(merged, *words, **environment)
        assert done.returncode == 2
        assert message in done.stderr, done.stderr
    assert "swapped" in push("me/m", merged).stderr


@pytest.mark.parametrize(
    ("pattern", "how"),
    [
        ("GET /api/models", {"status": 502}),
        ("POST /api/repos/create", {"status": 500}),
        ("objects/batch", {"status": 429}),
        ("PUT", {"status": 500}),
        ("PUT", {"cut": True}),
        (COMMIT, {"status": 503, "times": 2}),
        (COMMIT, {"cut": True}),
    ],
)
def test_trouble_that_passes(hub, push, merged, pattern, how):
    """Tried again, it works, and the result is the same."""
    hub.fail(pattern, **how)
    done = push(merged, "me/merged")
    assert done.returncode == 0, done.stderr
    assert contents(hub.repos["me/merged"]) == contents(merged)
    assert commits(hub, "me/merged") == 1
