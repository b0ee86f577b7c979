"""Mistyped words: the closest choice is named, and all wrong arguments at once."""

from __future__ import annotations

import pytest

import dora_convert
from dora_convert.errors import RefError, UsageError

from .hubserver import run as run_with


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("--method", "tis"), "ties"),
        (("--method", "TEIS"), "ties"),
        (("--dtype", "bfoat16"), "bfloat16"),
        (("--undo", "exat"), "exact"),
        (("--method", "xyz"), None),
    ],
)
def test_the_closest_choice(run, base, adapter, tmp_path, words, meant):
    """On the command line and in Python; nothing is suggested for a word that is like none."""
    code, _, err = run("merge", base.path, adapter, tmp_path / "out", *words)
    assert code == 2
    assert "is not one of" in err
    assert (f"Did you mean {meant!r}?" in err) if meant else "Did you mean" not in err
    with pytest.raises(UsageError, match="is not one of") as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out", **{words[0][2:]: words[1]})
    assert caught.value.hint == (f"did you mean {meant}?" if meant else None)


@pytest.mark.parametrize("verb", ["merge", "from-lora"])
@pytest.mark.parametrize("names", [("nob", "noa"), ("x/nob", "noa"), ("nob", "x/noa"), ("x/nob", "x/noa")])
def test_base_and_adapter_that_are_missing(run, verb, names, tmp_path):
    """A name with a slash may be a repo: it is looked up before one error names both."""
    code, _, err = run(verb, *names, tmp_path / "out")
    assert code == 2
    assert err.startswith("Error: 2 inputs cannot be read.")
    found = [line.split()[:2] for line in err.splitlines()[1:3]]
    assert found == [["BASE", repr(names[0])], ["ADAPTER", repr(names[1])]]
    assert "ADAPTER x/noa is" not in err


def test_repos_that_are_missing(hub, tmp_path):
    """The Hub is asked for both."""
    done = run_with(hub, tmp_path / "home", "merge", "org/nob", "org/noa", tmp_path / "out")
    assert done.returncode == 2
    assert "2 inputs cannot be read" in done.stderr
    assert "BASE 'org/nob'" in done.stderr


def test_push_names_all_that_is_wrong(run, tmp_path, base, monkeypatch):
    """Without a token, and before a file is hashed: DIR, REPO_ID and --base-model."""
    code, _, err = run("push", tmp_path / "nothing", "bad//id", "--base-model", "/x/y")
    assert code == 2
    assert err.startswith("Error: 3 arguments are wrong.")
    for word in ("DIR", "REPO_ID 'bad//id'", "--base-model '/x/y'"):
        assert word in err
    monkeypatch.setattr("dora_convert.hub.push.check_receipt", lambda _: pytest.fail("a file was read"))
    with pytest.raises(RefError, match="REPO_ID org/a/b is not a valid repo id"):
        dora_convert.push(base.path, "org/a/b")


def test_a_merge_checks_the_repo_first(run, base, adapter, tmp_path):
    """An invalid repo id is found before the inputs are opened."""
    code, _, err = run("merge", base.path, adapter, tmp_path / "out", "--push-to-hub", "org/a/b", "--dry-run")
    assert code == 2
    assert "REPO_ID org/a/b is not a valid repo id" in err
    assert not (tmp_path / "out.partial").exists()
