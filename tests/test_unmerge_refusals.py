"""unmerge of what is not as it was written, and of what no record holds."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.cli import main
from dora_convert.errors import MalformedError, OutputError, RefError, UnsupportedError, UsageError, VerificationError

from .test_undo_exact import same_as
from .test_unmerge import merged  # noqa: F401 - fixtures
from .toy import contents, edit_json, exact, load, make_adapter, make_base, rounded


def test_swapped(tmp_path, merged, adapter):
    """The adapter first, then the model: the command that was meant."""
    with pytest.raises(UsageError, match="MERGED and ADAPTER are swapped") as caught:
        dora_convert.unmerge(adapter, merged, tmp_path / "again")
    assert caught.value.hint == f"dora-convert unmerge {merged} {adapter} {tmp_path / 'again'}"


def test_another_adapter_is_refused(tmp_path, merged, base):
    """An adapter with other contents is not the one that was merged; the error names the files."""
    other = make_adapter(tmp_path / "other", base, dora=True, seed=3)
    with pytest.raises(RefError, match="not the one that was merged") as caught:
        dora_convert.unmerge(merged, other, tmp_path / "again")
    assert [fault.what for fault in caught.value.faults] == ["adapter_model.safetensors"]
    assert not list(tmp_path.glob("again*"))


@pytest.mark.parametrize("part", ["merged", "copied head", "side file"])
def test_a_changed_model_is_refused(tmp_path, merged, adapter, part):
    """The error names tensors that were trained or edited after the merge, and nothing is written."""
    if part == "side file":
        (merged / "tokenizer_config.json").write_text("{}")
        name = "tokenizer_config.json"
    else:
        name = "model.layers.1.mlp.down_proj.weight"
        table = json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"]
        tensors = load_file(merged / table[name])
        if part == "merged":
            tensors[name][2, 5] += 1
        else:
            del tensors[name]
            table.pop(name)
            edit_json(merged / "model.safetensors.index.json", weight_map=table)
        (merged / "model-00001-of-00002.safetensors").parent.mkdir(exist_ok=True)
        target = json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"].get(name)
        file = target or next(f.name for f in merged.glob("*.safetensors") if name in load_file(f))
        save_file(tensors, merged / file, {"format": "pt"})
    with pytest.raises(RefError, match="is not what was written") as caught:
        dora_convert.unmerge(merged, adapter, tmp_path / "again")
    assert [fault.what for fault in caught.value.faults] == [name]
    assert not list(tmp_path.glob("again*"))


def test_changed_where_no_adapter_was(tmp_path, merged, adapter):
    """An exact record has the hashes of what was copied: such a tensor is named, too, and nothing is written."""
    name = "model.layers.0.input_layernorm.weight"
    file = next(f for f in sorted(merged.glob("*.safetensors")) if name in load_file(f))
    tensors = load_file(file)
    tensors[name][3] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(RefError, match="is not what was written") as caught:
        dora_convert.unmerge(merged, adapter, tmp_path / "again")
    assert [fault.what for fault in caught.value.faults] == [name]
    assert not list(tmp_path.glob("again*"))


def test_a_damaged_record_is_found_out(tmp_path, merged, adapter):
    """A record whose bytes are not what was kept gives no base: unreadable, or another sha256, by tensor."""
    path = merged / "dora_convert/undo.safetensors"
    tensors = load_file(path)
    tensors["norm/0/model.layers.0.mlp.up_proj.weight"][7] *= 1.5
    save_file(tensors, path)
    with pytest.raises(MalformedError, match=r"norm/0/model\.layers\.0\.mlp\.up_proj\.weight is not what was written"):
        dora_convert.unmerge(merged, adapter, tmp_path / "again")
    receipt = merged / "dora_convert/receipt.json"  # as an older version left it
    edit_json(receipt, undo_record={})
    with pytest.raises(VerificationError, match="differ from the base's") as caught:
        dora_convert.unmerge(merged, adapter, tmp_path / "again")
    assert [fault.what for fault in caught.value.faults] == ["model.layers.0.mlp.up_proj.weight"]
    assert not list(tmp_path.glob("again*"))
    tensors["ulps/model.layers.1.mlp.up_proj.weight"][20:40] = 255
    save_file(tensors, path)
    with pytest.raises(MalformedError, match=r"ulps/model\.layers\.1\.mlp\.up_proj\.weight"):
        dora_convert.unmerge(merged, adapter, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_dora_without_norms_is_refused(tmp_path, base, adapter):
    """The reason and the three ways out; one of them is the base, which gives the norms."""
    dora_convert.merge(base.path, adapter, tmp_path / "out", undo="none")
    for model in (tmp_path / "out", bare(tmp_path / "out", tmp_path / "bare")):
        with pytest.raises(UnsupportedError) as caught:
            dora_convert.unmerge(model, adapter, tmp_path / "again")
        assert "‖W + sBA‖" in caught.value.text()
        for way in ("undo=", "base=", "copy the base"):
            assert way in caught.value.hint
        said = []
        report = dora_convert.unmerge(
            model, adapter, tmp_path / model.name / "../again", base=base.path, on_notice=said.append, overwrite=True
        )
        assert any("copying BASE is simpler" in text for text in said)
        close(base, load(tmp_path / "again"))
        assert report.verified.wrong_elements == 0
        shutil.rmtree(tmp_path / "again")


def test_a_record_that_is_half_gone(tmp_path, merged, adapter, base):
    """The receipt is there and the tensors are not: said so; with the base at hand, right up to rounding."""
    (merged / "dora_convert/undo.safetensors").unlink()
    with pytest.raises(RefError, match=r"undo\.safetensors is missing") as caught:
        dora_convert.unmerge(merged, adapter, tmp_path / "again")
    assert "base=" in caught.value.hint
    report = dora_convert.unmerge(merged, adapter, tmp_path / "again", base=base.path)
    assert any("what rounding took is lost" in text for text in report.warnings)
    assert report.exact["bit_exact"] < report.exact["tensors"]
    close(base, load(tmp_path / "again"))


def bare(merged, folder):
    """A merged model as other tools leave it."""
    shutil.copytree(merged, folder)
    shutil.rmtree(folder / "dora_convert")
    return folder


def close(base, got):
    """Every element within an ulp or two, and most of them right."""
    for name, W in base.tensors.items():
        assert (got[name].double() - W.double()).abs().max() <= 0.02 * W.double().abs().max(), name
        assert (got[name] == W).double().mean() > 0.5, name


def test_a_lora_without_a_record_is_subtracted(tmp_path, base):
    """W' − sBA, rounded once; the report says that nothing is proven and how much is lost."""
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    merged = bare(tmp_path / "out", tmp_path / "bare")
    report = dora_convert.unmerge(merged, adapter, tmp_path / "again")
    change = {name: exact(base, adapter)[name] - W.double() for name, W in base.tensors.items()}
    for name, got in load(tmp_path / "again").items():
        assert torch.equal(got, rounded(load(merged)[name].double() - change[name], torch.bfloat16)), name
    assert report.exact == {"tensors": 6, "bit_exact": 0}
    assert sum(module.lost for module in report.modules) > 0
    assert any("no record" in warning for warning in report.warnings)


def test_exact_says_so_where_nothing_is_lost(tmp_path):
    """A bf16 base merged into float32 loses little: hashes prove even without an exact record what came back whole."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    dora_convert.merge(base.path, adapter, tmp_path / "out", dtype="float32")
    report = dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "again")
    assert report.exact["bit_exact"] == report.exact["tensors"] == len(base.tensors)
    assert all(module.lost == 0 for module in report.modules)
    same_as(base.path, tmp_path / "again")


def test_the_command(tmp_path, merged, base, adapter, capsys):
    """As a user has it: a table, JSON, a dry run, and what is wrong in words."""
    out = tmp_path / "again"
    arguments = ["unmerge", str(merged), str(adapter), str(out)]
    assert run([*arguments, "--dry-run"]) == 0
    assert not out.exists()
    assert run([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert report["command"] == "unmerge"
    assert report["exact"] == {"tensors": 6, "bit_exact": 6}
    assert run([*arguments, "--overwrite"]) == 2  # nothing tells a recovered base from one of somebody's own
    assert "is a model" in capsys.readouterr().err
    shutil.rmtree(out)
    assert run(arguments) == 0
    assert "6 of 6 recovered tensors are the base's, bit for bit" in capsys.readouterr().out
    assert run(["unmerge", str(merged), str(out)]) == 2
    same_as(base.path, out)
    with pytest.raises(OutputError):
        dora_convert.unmerge(merged, adapter, merged / "inside")


def run(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_one_of_several_loras(tmp_path, base):
    """One LoRA comes out by itself: what is left is the merge of the others, with a record that undoes it in turn."""
    first = make_adapter(tmp_path / "first", base, dora=False, seed=2)
    second = make_adapter(tmp_path / "second", base, dora=False, seed=4, targets=["k_proj", "q_proj"])
    weight = (0.7, -0.4)
    dora_convert.merge(base.path, [first, second], tmp_path / "both", weight=weight, undo="exact")
    report = dora_convert.unmerge(tmp_path / "both", second, tmp_path / "one")
    assert report.exact == {"tensors": 4, "bit_exact": 0}
    change = {name: exact(base, first)[name] - W.double() for name, W in base.tensors.items()}
    for name, got in load(tmp_path / "one").items():
        want = base.tensors[name].double() + 0.7 * change[name]
        assert (got.double() - want).abs().max() <= 2**-7 * want.abs().max(), name
    receipt = json.loads((tmp_path / "one/dora_convert/receipt.json").read_text())
    assert [adapter["name"] for adapter in receipt["adapters"]] == ["first"]
    assert {name.split(".")[-2] for name in receipt["rounded"]} == {"q_proj"}
    report = dora_convert.unmerge(tmp_path / "one", first, tmp_path / "none")
    assert report.exact["tensors"] == 8
    assert all(module.bit_exact or module.lost for module in report.modules)
    close(base, load(tmp_path / "none"))
    files = {name: data for name, data in contents(tmp_path / "none").items() if not name.endswith(".safetensors")}
    assert files == {n: d for n, d in contents(base.path).items() if not n.endswith(".safetensors")}
