"""Strings and numbers where lists are meant: each is a list of one, in every verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dora_convert
from dora_convert.errors import DoraConvertError

from .toy import contents, edit_json, exact, load, make_adapter

FILE = "adapter_model.safetensors"


def tensors(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if name.endswith((".safetensors", "config.json"))}


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("glob", ["*.up_proj", "*layers.1*", "model.layers.0.mlp.down_proj"])
def test_a_glob_is_a_list_of_one(tmp_path, base, adapter, option, glob):
    """A string is not its characters: each of them alone would be a glob, and `*` is every module."""
    dora_convert.merge(base.path, adapter, tmp_path / "one", **{option: glob})
    dora_convert.merge(base.path, adapter, tmp_path / "list", **{option: [glob]})
    assert tensors(tmp_path / "one") == tensors(tmp_path / "list")
    want, got = exact(base, adapter), load(tmp_path / "one")
    changed = {name for name in got if not torch.equal(got[name], base.tensors[name])}
    assert 0 < len(changed) < sum(not torch.equal(want[name], x.double()) for name, x in base.tensors.items())
    for verdict in (
        dora_convert.verify(base.path, adapter, tmp_path / "one", **{option: glob}),
        dora_convert.verify(base.path, [adapter], tmp_path / "one", **{option: [glob]}),
    ):
        assert verdict.verdict == "agree"


def test_a_tuple_and_a_generator_are_lists(tmp_path, base, adapter):
    """Any iterable of globs."""
    for number, globs in enumerate((("*.up_proj",), (glob for glob in ["*.up_proj"]), {"*.up_proj"})):
        dora_convert.merge(base.path, adapter, tmp_path / f"out{number}", include=globs)
    assert tensors(tmp_path / "out0") == tensors(tmp_path / "out1") == tensors(tmp_path / "out2")


@pytest.mark.parametrize("verb", ["to_lora", "from_lora"])
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_the_verbs_that_write_adapters(tmp_path, base, verb, option):
    """The same modules as with a list."""
    adapter = make_adapter(tmp_path / "lora", base, dora=False)
    options = {"rank": 2} if verb == "to_lora" else {}
    made = [tmp_path / "one", tmp_path / "list"]
    for out, globs in zip(made, ("*.up_proj", ["*.up_proj"]), strict=True):
        getattr(dora_convert, verb)(base.path, adapter, out, **options, **{option: globs})
    names = [load_file(out / FILE).keys() for out in made]
    assert names[0] == names[1]
    assert option == "exclude" or all("up_proj" in name for name in names[1])


def test_extract(tmp_path, base, adapter):
    dora_convert.merge(base.path, adapter, tmp_path / "tuned")
    for out, globs in (("one", "*.up_proj"), ("list", ["*.up_proj"])):
        dora_convert.extract(base.path, tmp_path / "tuned", tmp_path / out, rank=4, include=globs)
    names = [load_file(tmp_path / out / FILE).keys() for out in ("one", "list")]
    assert names[0] == names[1]
    assert all("up_proj" in name for name in names[0])


def test_a_field_is_a_list_of_one(tmp_path, base, adapter):
    """ignore_field, in every verb that has it; the receipt says the field, not its letters."""
    edit_json(adapter / "adapter_config.json", some_new_field=True)
    with pytest.raises(DoraConvertError):
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    dora_convert.merge(base.path, adapter, tmp_path / "out", ignore_field="some_new_field")
    receipt = json.loads((tmp_path / "out/dora_convert/receipt.json").read_text())
    assert "some_new_field" in json.dumps(receipt)
    (tmp_path / "out/dora_convert/receipt.json").unlink()
    found = dora_convert.verify(base.path, adapter, tmp_path / "out", ignore_field="some_new_field")
    assert found.verdict == "agree"
    dora_convert.to_lora(base.path, adapter, tmp_path / "lora", rank=2, ignore_field="some_new_field")
    assert dora_convert.inspect(adapter, ignore_field="some_new_field").refused is None


@pytest.mark.parametrize("weight", [0.5, 1, -0.25])
def test_a_weight_is_a_list_of_one(tmp_path, base, adapter, weight):
    """A number for one adapter; two adapters need two."""
    dora_convert.merge(base.path, adapter, tmp_path / "one", weight=weight)
    dora_convert.merge(base.path, adapter, tmp_path / "list", weight=[weight])
    assert tensors(tmp_path / "one") == tensors(tmp_path / "list")
    assert dora_convert.verify(base.path, adapter, tmp_path / "one", weight=weight).verdict == "agree"
    other = make_adapter(tmp_path / "other", base, dora=False)
    with pytest.raises(DoraConvertError, match="2 adapters"):
        dora_convert.merge(base.path, [adapter, other], tmp_path / "two", weight=weight)


@pytest.mark.parametrize("bad", [{"include": 5}, {"exclude": [1]}, {"ignore_field": b"x"}, {"weight": "0.5"}], ids=str)
def test_other_types_are_errors_of_ours(tmp_path, base, adapter, bad):
    """No TypeError from deep inside, and nothing merged under a misunderstanding."""
    with pytest.raises(DoraConvertError, match=next(iter(bad)).replace("_", "[-_]")):
        dora_convert.merge(base.path, adapter, tmp_path / "out", **bad)
    assert not (tmp_path / "out").exists()


def test_adapters_as_paths_and_tuples(tmp_path, base, adapter):
    """One Path, a string, a tuple."""
    for number, adapters in enumerate((adapter, str(adapter), (adapter,), [str(adapter)])):
        dora_convert.merge(base.path, adapters, tmp_path / f"out{number}")
        assert tensors(tmp_path / f"out{number}") == tensors(tmp_path / "out0")
