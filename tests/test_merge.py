"""merge, end to end on toy checkpoints, against float64 and the bytes on disk."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import PlanError, UsageError
from dora_convert.storage import reader as blocks

from .toy import contents, exact, load, make_adapter, make_base, rounded, write_json, write_shards  # fmt: skip

HALVES = [torch.bfloat16, torch.float16]


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == dtype
        assert torch.equal(got[name], rounded(x, dtype)), name


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("dora", [True, False])
def test_every_element_is_the_rounded_float64_result(tmp_path, dtype, dora):
    """In any floating dtype, merged tensors are rounded once and all others are untouched."""
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(tmp_path / "adapter", base, dora=dora)
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    if dtype == torch.float64:
        for name, x in exact(base, adapter).items():
            torch.testing.assert_close(load(tmp_path / "out")[name], x, rtol=1e-14, atol=1e-15)
    else:
        same(load(tmp_path / "out"), exact(base, adapter), dtype)
        assert report.verified.max_ulp == 0
    assert report.verified.wrong_elements == 0
    assert report.verified.checked > 0


def test_the_base_is_not_touched(tmp_path, base, adapter):
    """Merging reads the base and the adapter and writes neither."""
    before = contents(base.path), contents(adapter)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert (contents(base.path), contents(adapter)) == before


def test_rounding_is_not_double(tmp_path):
    """Elements whose float32 value is a tie of bfloat16 are rounded from float64, not twice."""
    path = tmp_path / "base"
    path.mkdir()
    weight = torch.ones(32, 48, dtype=torch.bfloat16)
    save_file({"w.weight": weight}, path / "model.safetensors")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    half_ulp, tiny = 2.0**-8, 2.0**-40
    save_file(
        {
            "base_model.model.w.lora_A.weight": torch.stack([torch.full((48,), half_ulp), torch.full((48,), tiny)]),
            "base_model.model.w.lora_B.weight": torch.ones(32, 2),
        },
        adapter / "adapter_model.safetensors",
    )
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    dora_convert.merge(path, adapter, tmp_path / "out")
    merged = load(tmp_path / "out")["w.weight"]
    assert (merged == 1 + 2.0**-7).all()  # just above the tie; by way of float32 it would be the tie, and then 1
    assert (merged != (weight.double() + half_ulp + tiny).bfloat16()).all()


def test_output_bytes_do_not_depend_on_resources(tmp_path, monkeypatch):
    """Any number of workers and any budget give the same files, receipt and undo record included."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1 << 10)
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    found = []
    for number, limits in enumerate(({}, {"workers": 1}, {"workers": 7}, {"max_memory": "60KB", "workers": 3})):
        out = tmp_path / f"out{number}"
        dora_convert.merge(base.path, adapter, out, **limits)
        found.append(contents(out))
    assert all(other == found[0] for other in found[1:])


def test_blocks_smaller_than_the_tensor(tmp_path, monkeypatch):
    """Tensors of several blocks, with a remainder, come out like those of one."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1 << 10)
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    assert len(list(blocks.spans(*_stored(base, "mlp.up_proj").matrix))) > 2
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    same(load(tmp_path / "out"), exact(base, adapter), torch.bfloat16)


def _stored(base, name):
    from dora_convert.storage.checkpoint import open_checkpoint
    from dora_convert.storage.refs import local_source

    return open_checkpoint(local_source(base.path)).tensors[f"model.layers.0.{name}.weight"]


def test_sharding_and_metadata_are_the_bases(tmp_path, base, adapter):
    """Same files, same tensors in each, same header metadata; the index counts bytes and parameters."""
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    for file in base.path.glob("*.safetensors"):
        with safe_open(file, "pt") as old, safe_open(tmp_path / "out" / file.name, "pt") as new:
            assert list(old.keys()) == list(new.keys())
            assert old.metadata() == new.metadata()
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors = load(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())


def test_single_file_stays_single(tmp_path):
    """A base of one file gives an output of one file, without an index."""
    base = make_base(tmp_path / "base", shards=1)
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("model*.safetensors*")] == ["model.safetensors"]
    same(load(tmp_path / "out"), exact(base, adapter), torch.bfloat16)


@pytest.mark.parametrize(("size", "limit"), [("20KB", 20_000), ("8KiB", 8192), (9000, 9000), ("1MB", 10**6)])
def test_max_shard_size(tmp_path, base, adapter, size, limit):
    """Shards are filled up to the size; a tensor larger than it gets a shard of its own; one shard needs no index."""
    dora_convert.merge(base.path, adapter, tmp_path / "out", max_shard_size=size)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    sizes = [[tensor.nbytes for tensor in load_file(path).values()] for path in shards]
    assert all(sum(found) <= limit or len(found) == 1 for found in sizes)
    assert (len(shards) == 1) == (limit == 10**6)
    assert (tmp_path / "out/model.safetensors.index.json").exists() == (len(shards) > 1)
    same(load(tmp_path / "out"), exact(base, adapter), torch.bfloat16)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_dtype_converts_every_floating_tensor(tmp_path, adapter, base, name):
    """Copied tensors are converted, merged ones rounded into the new dtype, integers left alone, the config follows."""
    dtype = getattr(torch, name)
    tensors = base.tensors | {"ids": torch.arange(5), "mask": torch.tensor([[True, False]])}
    write_shards(base.path, tensors, 2)
    dora_convert.merge(base.path, adapter, tmp_path / "out", dtype=name)
    got = load(tmp_path / "out")
    assert torch.equal(got.pop("ids"), tensors["ids"])
    assert torch.equal(got.pop("mask"), tensors["mask"])
    same(got, exact(base, adapter), dtype)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == name


def test_dtype_of_the_base_leaves_the_config_alone(tmp_path, base, adapter):
    """Asking for the dtype that is there already changes no byte of the config."""
    dora_convert.merge(base.path, adapter, tmp_path / "out", dtype="bfloat16")
    assert (tmp_path / "out/config.json").read_bytes() == (base.path / "config.json").read_bytes()


def test_side_files(tmp_path, base, adapter):
    """Side files are copied, tokenizer files of the adapter win, other weights and hidden files stay behind."""
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", "model.gguf", "adapter_config.json"):
        (base.path / name).parent.mkdir(exist_ok=True)
        (base.path / name).write_bytes(b"stale")
    (base.path / ".git").mkdir()
    (base.path / ".git/config").write_text("x")
    (base.path / "1_Pooling").mkdir()
    (base.path / "1_Pooling/config.json").write_text("{}")
    (adapter / "tokenizer_config.json").write_text('{"new": 1}')
    (adapter / "chat_template.jinja").write_text("{{ x }}")
    (adapter / "training_args.bin").write_bytes(b"no")
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    names = set(contents(tmp_path / "out"))
    assert names == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "config.json", "tokenizer_config.json", "modeling_toy.py", "1_Pooling/config.json", "chat_template.jinja",
        "README.md", "dora_convert/receipt.json", "dora_convert/undo.safetensors",
    }  # fmt: skip
    assert (tmp_path / "out/tokenizer_config.json").read_text() == '{"new": 1}'
    assert set(report.left_behind) == {"pytorch_model.bin", "original/consolidated.00.pth", "model.gguf"}


def test_side_files_may_be_links(tmp_path, base, adapter):
    """A folder may be made of symbolic links; if the user says so, what they point to is copied."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in base.path.iterdir():
        (linked / path.name).symlink_to(path)
    dora_convert.merge(linked, adapter, tmp_path / "out", follow_links=True)
    same(load(tmp_path / "out"), exact(base, adapter), torch.bfloat16)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_modules_to_save_replace(tmp_path, base):
    """A module saved whole replaces the base's; the rows that differ are kept for undo."""
    head = base.tensors["lm_head.weight"].float()
    head[5] += 1
    head[60] *= 2
    adapter = make_adapter(
        tmp_path / "adapter", base, dora=False, modules_to_save=["lm_head"],
        extra={"base_model.model.lm_head.weight": head},
    )  # fmt: skip
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")["lm_head.weight"], head.bfloat16())
    record = load_file(tmp_path / "out/dora_convert/undo.safetensors")
    assert record["index/lm_head.weight"].tolist() == [5, 60]
    assert torch.equal(record["rows/lm_head.weight"], base.tensors["lm_head.weight"][[5, 60]])
    assert report.tensors["replaced"] == 1


def test_base_layer_is_replaced_then_added_to(tmp_path, base):
    """PEFT saves an adapted head's own weight beside its factors: that weight first, then the delta."""
    saved = torch.randn(base.tensors["lm_head.weight"].shape)
    adapter = make_adapter(
        tmp_path / "adapter", base, dora=False, targets=("lm_head",),
        extra={"base_model.model.lm_head.base_layer.weight": saved},
    )  # fmt: skip
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    base.tensors["lm_head.weight"] = saved
    same(load(tmp_path / "out"), exact(base, adapter), torch.bfloat16)


def test_several_adapters_add_up(tmp_path, base):
    """W' = W + Σ wᵢ·(applyᵢ(W) − W), each DoRA's norm on the unmerged base, whatever the order."""
    paths = [make_adapter(tmp_path / f"a{k}", base, dora=k > 0, seed=k + 5) for k in range(3)]
    weights = [0.5, 1.0, -0.25]
    want = {name: tensor.double() for name, tensor in base.tensors.items()}
    for path, weight in zip(paths, weights, strict=True):
        for name, x in exact(base, path).items():
            want[name] = want[name] + weight * (x - base.tensors[name].double())
    dora_convert.merge(base.path, paths, tmp_path / "out", weight=weights)
    same(load(tmp_path / "out"), want, torch.bfloat16)
    dora_convert.merge(base.path, paths[::-1], tmp_path / "turned", weight=weights[::-1])
    same(load(tmp_path / "turned"), want, torch.bfloat16)


def test_weight_of_a_replacement_is_refused(tmp_path, base):
    """A replaced tensor has no half strength, and two adapters cannot both replace it."""
    paths = []
    for k in range(2):
        extra = {"base_model.model.lm_head.weight": torch.full(base.tensors["lm_head.weight"].shape, 1.0 + k)}
        paths.append(make_adapter(tmp_path / f"a{k}", base, dora=False, modules_to_save=["lm_head"], extra=extra))
    with pytest.raises(PlanError) as caught:
        dora_convert.merge(base.path, paths, tmp_path / "out", weight=[0.5, 1])
    assert "weight of 0.5" in caught.value.text()
    assert "a0 and a1 both replace lm_head.weight" in caught.value.text()
    with pytest.raises(UsageError, match="1 weight= for 2 adapters"):
        dora_convert.merge(base.path, paths, tmp_path / "out", weight=[1])


def test_include_and_exclude(tmp_path, base, adapter):
    """Modules chosen by name; the ledger says which tensors were left out."""
    report = dora_convert.merge(base.path, adapter, tmp_path / "out", include=["*mlp*"], exclude=["*.1.*"])
    want = {name: tensor.double() for name, tensor in base.tensors.items()}
    want |= {name: x for name, x in exact(base, adapter).items() if "layers.0.mlp" in name}
    same(load(tmp_path / "out"), want, torch.bfloat16)
    assert {entry["fate"] for entry in report.ledger} == {"merged", "ignored"}
    assert len(report.ledger) == 18


def test_ledger_accounts_for_every_tensor(tmp_path, base, adapter):
    """Each adapter tensor is in the ledger once, with the output tensor it went into."""
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert sorted(entry["tensor"] for entry in report.ledger) == sorted(tensors)
    for entry in report.ledger:
        assert entry["fate"] == "merged"
        assert entry["into"][0].removesuffix(".weight") in entry["tensor"]
