"""Values that cannot be what they are taken for: normalised magnitudes, one rank's part of a shared save, tensors of nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.errors import DoraConvertError

from .toy import ALPHA, RANK, Base, edit_json, exact, load, low_rank, make_adapter, make_base, write_shards

FILE, PREFIX = "adapter_model.safetensors", "base_model.model."
MAGNITUDE = ".lora_magnitude_vector"
HINT = "trained on"


def make(tmp_path: Path, scale: float = 4.0) -> Base:
    """A base whose rows are far from 1 in length."""
    base = make_base(tmp_path / "wide", torch.float32, shards=1)
    for name, tensor in base.tensors.items():
        base.tensors[name] = tensor * scale if name.endswith("proj.weight") else tensor
    write_shards(base.path, base.tensors, 1)
    return base


def normalised(base: Base, adapter: Path, modules: str = "", dtype: torch.dtype = torch.float32) -> list[str]:
    """What TensorRT-LLM's normalize_weights.py does: m/‖W + sBA‖ under PEFT's key; returns the modules."""
    tensors, done = load_file(adapter / FILE), []
    for name in [name for name in tensors if name.endswith(MAGNITUDE) and modules in name]:
        module = name.removeprefix(PREFIX).removesuffix(MAGNITUDE)
        V = base.tensors[f"{module}.weight"].double() + ALPHA / RANK * low_rank(tensors, module)
        tensors[name] = (tensors[name].double() / V.norm(dim=1)).to(dtype)
        done.append(module)
    save_file(tensors, adapter / FILE)
    return done


# ---- magnitudes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.2, 4.0, 100.0])
def test_normalised_magnitudes_multiply_rows(tmp_path, scale, dtype):
    """They are around 1 where the weight's rows are not: the base tells, a warning says so, and the merge is right."""
    base = make(tmp_path, scale)
    adapter = make_adapter(tmp_path / "dora", base, dora=True)
    wanted = exact(base, adapter)
    modules = normalised(base, adapter, dtype=dtype)
    notices: list[str] = []
    dora_convert.merge(base.path, adapter, tmp_path / "out", on_notice=notices.append)
    assert any("TensorRT-LLM" in text for text in notices)
    merged = load(tmp_path / "out")
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    for module in modules:
        name = f"{module}.weight"
        assert (merged[name].double() - wanted[name]).norm() < bound * wanted[name].norm()
    assert dora_convert.verify(base.path, adapter, tmp_path / "out").verdict == "agree"
    dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "back")  # the receipt has the decision
    for name, tensor in load(tmp_path / "back").items():
        assert torch.allclose(tensor, base.tensors[name], rtol=1e-4, atol=1e-5)


def test_some_normalised_modules_are_named(tmp_path):
    """A file of both kinds: only the ones that are."""
    base = make(tmp_path)
    adapter = make_adapter(tmp_path / "dora", base, dora=True)
    modules = normalised(base, adapter, "up_proj")
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert all(module in caught.value.text() for module in modules)
    assert "k_proj" not in caught.value.text()


@pytest.mark.parametrize("factor", [1.0, 0.5, 3.0])
def test_magnitudes_of_weights_whose_rows_are_short_or_long(tmp_path, factor):
    """m around 1 is right where ‖W‖ is around 1; other magnitudes are none of this, however far from ‖W‖ they are."""
    base = make(tmp_path)
    for name, tensor in base.tensors.items():
        if name.endswith("proj.weight"):
            base.tensors[name] = tensor / tensor.norm(dim=1, keepdim=True)
    write_shards(base.path, base.tensors, 1)
    adapter = make_adapter(tmp_path / "dora", base, dora=True)
    tensors = load_file(adapter / FILE)
    save_file({name: x * factor if name.endswith(MAGNITUDE) else x for name, x in tensors.items()}, adapter / FILE)
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    for name, x in exact(base, adapter).items():
        torch.testing.assert_close(load(tmp_path / "out")[name], x.float(), rtol=1e-5, atol=1e-6)
    assert any("another base" in text for text in report.warnings) == (factor == 3.0)


# ---- one rank's part


def keep(adapter: Path, parts: int, which: int, modules: str = "") -> None:
    """What ZeRO-3 leaves in a file where one rank saves without gathering: a part of each lora_B, the rest zeros."""
    tensors = load_file(adapter / FILE)
    for name, tensor in tensors.items():
        if "lora_B" in name and modules in name:
            size = len(tensor) // parts
            part = torch.zeros_like(tensor)
            part[which * size : (which + 1) * size] = tensor[which * size : (which + 1) * size]
            tensors[name] = part
    save_file(tensors, adapter / FILE)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize(("parts", "which"), [(8, 0), (8, 7), (4, 2), (2, 1)])
def test_one_part_of_each_lora_b_is_warned_of(tmp_path, base, parts, which, dora, run):
    """The rest is exactly zero, in the same share of every module."""
    adapter = make_adapter(tmp_path / "a", base, dora=dora)
    keep(adapter, parts, which)
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    said = [text for text in report.warnings if "lora_B" in text and "zero" in text]
    assert len(said) == 1
    assert f"{parts - 1}/{parts}" in said[0]
    assert "ZeRO-3" in said[0]
    assert "lora_B" in run("merge", base.path, adapter, tmp_path / "cli")[2]


def zero_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[[1, 5, 11]] = 0
    return tensor


FINE = {
    "all of it": lambda _, x: x,
    "some rows pruned": zero_rows,
    "a layer that was frozen": lambda name, x: x * ("layers.0" in name),
    "a kind of module that was frozen": lambda name, x: x * ("up_proj" not in name),
    "one module's half": lambda name, x: torch.cat([x[: len(x) // 2], 0 * x[len(x) // 2 :]]) if "1.mlp.up" in name else x,
    "untrained": lambda _, x: x * 0,
}  # fmt: skip


@pytest.mark.parametrize("case", FINE)
def test_zeros_that_training_leaves_are_not(tmp_path, base, case):
    """Modules that were not trained are zero as a whole; pruned rows lie anywhere."""
    adapter = make_adapter(tmp_path / "a", base, dora=False)
    tensors = load_file(adapter / FILE)
    tensors = {name: FINE[case](name, x).contiguous() if "lora_B" in name else x for name, x in tensors.items()}
    save_file(tensors, adapter / FILE)
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert not any("ZeRO" in text for text in report.warnings)


# ---- nothing


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("which", ["lora_", "lora_A", "magnitude"])
def test_empty_tensors_are_called_empty(tmp_path, base, suffix, which):
    """ZeRO-3's placeholders, [0]: the base has nothing to do with it. inspect says the same."""
    adapter = make_adapter(tmp_path / "a", base, dora=True)
    tensors = load_file(adapter / FILE)
    empty = sorted(name for name in tensors if which in name)
    tensors |= {name: torch.zeros(0) for name in empty}
    (adapter / FILE).unlink()
    if suffix == ".bin":
        torch.save(tensors, adapter / "adapter_model.bin")
    else:
        save_file(tensors, adapter / FILE)
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    error = caught.value
    assert "empty" in error.text()
    assert "ZeRO-3" in f"{error.text()} {error.hint}"
    assert HINT not in f"{error.hint}"
    assert "do not make" not in error.text()
    assert "not matrices" not in error.text()
    report = dora_convert.inspect(adapter)
    assert any("empty" in fault["why"] for fault in report.faults)


def test_an_empty_tensor_of_the_base(tmp_path, base, adapter):
    """The base was saved so: its tensor is called empty."""
    name = "model.layers.0.mlp.up_proj.weight"
    write_shards(base.path, base.tensors | {name: torch.zeros(0).bfloat16()}, 2)
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert "empty" in caught.value.text()
    assert name in caught.value.text()
    assert HINT not in f"{caught.value.hint}"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
FILES = {  # what is in the file, and what it is called
    "no bytes": (b"", "is empty"),
    "no tensors": (None, "no tensors"),
    "a pointer": (POINTER, "Git LFS"),
    "a page": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
}


@pytest.mark.parametrize("file", [FILE, "adapter_model.bin"])
@pytest.mark.parametrize("case", FILES)
def test_files_that_hold_nothing(tmp_path, base, adapter, case, file):
    """The file is named, with what it is, in merge and in inspect."""
    data, word = FILES[case]
    (adapter / FILE).unlink()
    if data is not None:
        (adapter / file).write_bytes(data)
    elif file == FILE:
        save_file({}, adapter / FILE)
    else:
        torch.save({}, adapter / file)
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert file in caught.value.text()
    assert word in caught.value.text()
    assert HINT not in f"{caught.value.hint}"
    try:
        report = dora_convert.inspect(adapter)
    except DoraConvertError as error:
        assert word in error.text()  # noqa: PT017 - an answer or an error, with the same words
    else:
        assert any(word in text for text in (*report.notes, *(fault["why"] for fault in report.faults)))


def broken(tensors: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    match case:
        case "no lora_A":
            return {name: x for name, x in tensors.items() if "lora_A" not in name}
        case "other names":
            return {name.replace("mlp", "feed_forward").replace("self_attn", "attn"): x for name, x in tensors.items()}
        case "other sizes":
            return {
                name: torch.cat([x, x], dim=-1).contiguous() if "lora_A" in name else x for name, x in tensors.items()
            }
    return tensors


@pytest.mark.parametrize(
    ("case", "likely"),
    [("no lora_A", False), ("rank", False), ("rows", False), ("dora", False), ("other names", True), ("other sizes", True)],
)  # fmt: skip
def test_the_hint_about_the_base_is_given_where_it_is_likely(tmp_path, base, case, likely):
    """An adapter that contradicts itself would not fit its own base, either; one that fits nowhere has another."""
    config = {"rank": {"r": 9}, "rows": {"trainable_token_indices": [1, 2]}, "dora": {"use_dora": True}}
    extra = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(3, 40)}
    adapter = make_adapter(tmp_path / "a", base, dora=False, extra=extra if case == "rows" else None)
    edit_json(adapter / "adapter_config.json", **config.get(case, {}))
    save_file(broken(load_file(adapter / FILE), case), adapter / FILE)
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert (HINT in f"{caught.value.hint}") == likely


def test_magnitudes_of_a_large_change_are_not_normalised(tmp_path):
    """Magnitudes near 1 that are the norms of W + sBA are norms, though those of W are far from them."""
    torch.manual_seed(0)
    weights = {f"model.layers.{k}.mlp.up_proj.weight": 0.02 * torch.randn(40, 32) for k in range(3)}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base/model.safetensors", {"format": "pt"})
    (tmp_path / "base/config.json").write_text('{"model_type": "llama"}')
    base = Base(tmp_path / "base", weights)
    make_adapter(tmp_path / "lora", base, dora=False, targets=("up_proj",))
    path = tmp_path / "lora/adapter_model.safetensors"
    factors = {name: tensor * (7 if "lora_B" in name else 1) for name, tensor in load_file(path).items()}
    save_file(factors, path, {"format": "pt"})
    dora_convert.from_lora(base.path, tmp_path / "lora", tmp_path / "dora")
    merged = []
    for name in ("lora", "dora"):
        dora_convert.merge(base.path, tmp_path / name, tmp_path / f"by {name}")
        merged.append(load(tmp_path / f"by {name}"))
    assert all(torch.allclose(merged[1][name], tensor, atol=1e-6) for name, tensor in merged[0].items())
