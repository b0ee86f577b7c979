"""The time that a run waits for the Hub; tests against the toy Hub do not wait."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dora_convert.sources import hub_client as answers


class RefusedError(Exception):
    """As huggingface_hub raises it."""

    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(status)
        self.response = SimpleNamespace(status_code=status, headers=headers)


@pytest.mark.parametrize(
    ("errors", "waits"),
    [
        ([RefusedError(503)] * 4, [0.5, 1, 2, 4]),
        ([RefusedError(429, **{"Retry-After": "3"})] * 2, [3, 3]),
        ([RefusedError(429, **{"Retry-After": "1000"}), RefusedError(502)], [60, 1]),
        ([RefusedError(429, **{"Retry-After": "Wed, 21 Oct"})], [0.5]),
    ],
)
def test_busy_servers_are_waited_for(monkeypatch, errors, waits):
    """Longer each time, and as long as the server asks for, within a minute."""
    slept, left = [], list(errors)
    monkeypatch.setattr(answers.time, "sleep", slept.append)

    def call():
        if left:
            raise left.pop(0)
        return "an answer"

    assert answers.with_retries(call) == "an answer"
    assert slept == waits


@pytest.mark.parametrize(("error", "calls"), [(RefusedError(503), 5), (RefusedError(404), 1), (KeyError(), 1)])
def test_not_for_ever(monkeypatch, error, calls):
    """After four waits the error is the answer; one that will not pass is so at once."""
    seen = []
    monkeypatch.setattr(answers.time, "sleep", lambda _: None)

    def call():
        seen.append(1)
        raise error

    with pytest.raises(type(error)):
        answers.with_retries(call)
    assert len(seen) == calls
