"""Several inputs that cannot be read are named in one error, and a path is named as it was typed."""

from __future__ import annotations

import json

import pytest

import dora_convert

MISSING = {
    "merge": ("BASE", "ADAPTER"),
    "unmerge": ("MERGED", "ADAPTER"),
    "from-lora": ("BASE", "ADAPTER"),
    "to-lora": ("BASE", "ADAPTER"),
    "extract": ("BASE", "TUNED"),
    "verify": ("BASE", "ADAPTER", "MERGED"),
    "analyze": ("BASE", "TUNED"),
}


@pytest.mark.parametrize("verb", MISSING)
def test_all_missing_inputs_are_named_at_once(tmp_path, run, verb):
    """No second run is needed to learn of the second mistake."""
    refs = [f"./no-{word.lower()}" for word in MISSING[verb]]
    out = [] if verb in ("verify", "analyze") else [tmp_path / "out"]
    rank = ["--rank", "2"] if verb in ("to-lora", "extract") else []
    code, printed, err = run(verb, *refs, *out, *rank, "--json")
    assert (code, printed) == (2, "")
    error = json.loads(err)["error"]
    named = [f"{word} {ref!r}" for word, ref in zip(MISSING[verb], refs, strict=True)]
    assert [fault["what"] for fault in error["faults"]] == named
    assert {fault["why"] for fault in error["faults"]} == {"does not exist"}
    assert (error["kind"], error["hint"]) == ("reference", "a Hub repo is written org/name")


@pytest.mark.parametrize("verb", ["convert", "inspect"])
def test_a_missing_base_is_named_beside_a_missing_adapter(tmp_path, run, verb):
    out = [tmp_path / "out", "--to", "mlx"] if verb == "convert" else []
    code, _, err = run(verb, "./no-adapter", *out, "--base", "./no-base")
    assert code == 2
    assert "./no-adapter" in err
    assert "./no-base" in err


def test_hints_for_typing_errors_are_kept(tmp_path, base, adapter):
    """Both words are close to folders."""
    with pytest.raises(dora_convert.RefError) as caught:
        dora_convert.merge(tmp_path / "bsae", tmp_path / "adaptre", tmp_path / "out")
    assert caught.value.hint == f"did you mean {base.path}? did you mean {adapter}?"


def test_both_broken_inputs_are_named(tmp_path, base, adapter, run):
    """A truncated shard of the base, and an adapter without weights."""
    shard = next(base.path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    (adapter / "adapter_model.safetensors").unlink()
    code, _, err = run("merge", base.path, adapter, tmp_path / "out")
    assert code == 2
    assert shard.name in err
    assert "but no adapter_model.safetensors" in err
    assert "2 inputs cannot be read" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_an_empty_folder_is_named_by_its_path(tmp_path, base, adapter, run, what):
    """Several folders may have that last word."""
    empty = tmp_path / "a" / "model"
    empty.mkdir(parents=True)
    words = [empty, adapter] if what == "base" else [base.path, empty]
    code, _, err = run("merge", *words, tmp_path / "out")
    assert code == 2
    assert f"{empty} " in err
    assert "Hint: " in err


@pytest.mark.parametrize("verb", ["merge", "from-lora"])
def test_the_home_folder_is_meant_by_a_tilde_in_out_too(tmp_path, monkeypatch, base, run, verb):
    """A shell leaves it in quotes, and after `=`."""
    from .toy import make_adapter

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make_adapter(tmp_path / "lora", base, dora=False)
    code, printed, err = run(verb, base.path, "~/lora", "~/out", "--quiet")
    assert code == 0, err
    assert printed == f"{tmp_path}/out\n"
    assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "~").exists()


def test_an_empty_out_is_refused(base, adapter, run, monkeypatch, tmp_path):
    """The path of an unset variable is not the current folder."""
    monkeypatch.chdir(tmp_path)
    code, _, err = run("merge", base.path, adapter, "")
    assert code == 2
    assert "OUT is empty" in err


def test_a_word_too_many_in_place_is_taken_for_out(base, adapter, run, tmp_path):
    code, _, err = run("merge", "--in-place", base.path, adapter, tmp_path / "out")
    assert code == 2
    assert "--in-place takes no OUT" in err
