"""Check several weights at once: a stack says of each what a check of the weight alone says."""

from __future__ import annotations

import random
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.adapters import Decomposed
from dora_convert.engine.precision import GRID, TORCH, nearest
from dora_convert.errors import VerificationError
from dora_convert.output import finished
from dora_convert.output.finished import TensorResult
from dora_convert.output.shards import ShardFiles
from dora_convert.parity import stacks
from dora_convert.parity.self_check import SelfCheck, sample_rows
from dora_convert.parity.stack_facts import least_room
from dora_convert.parity.stacks import CPU, SampledRows, verdicts_on_right
from dora_convert.plan.plan import Options
from dora_convert.plan.planner import make_plan
from dora_convert.sources import Session
from dora_convert.sources.inputs import open_inputs
from dora_convert.storage.reader import Reader

from .toy import embeddings_and_head, exact, load, make_adapter, make_base, rounded

NOTHING = TensorResult(None, "", None)


def checked(base, adapters, out):
    """Return the changed items of a merge, the self-check of OUT, and its reader."""
    checkpoint, opened = open_inputs(str(base.path), list(map(str, adapters)), Session(), out=str(out))
    plan, reader = make_plan(checkpoint, opened, [1.0] * len(opened), Options()), Reader()
    return [item for item in plan.items if item.changed], SelfCheck(out, plan, reader, 1 << 26), reader


def right_names(items, check, reader, elements=1 << 16) -> dict:
    sampled = [SampledRows(item, check._written.tensor(item.name), check._rows(item)) for item in items]
    return verdicts_on_right(sampled, reader, CPU, elements)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_stack_says_what_each_check_says(tmp_path, dtype):
    """LoRAs, DoRAs and an embedding of one merge: all plain weights are in stacks, and all verdicts are the same."""
    base = make_base(tmp_path / "base", dtype)
    targets = ("q_proj", "k_proj", "up_proj")
    dora = make_adapter(tmp_path / "dora", base, dora=True, targets=targets, extra=embeddings_and_head())
    lora = make_adapter(tmp_path / "lora", base, dora=False, targets=("down_proj",))
    dora_convert.merge(base.path, [dora, lora], tmp_path / "out")
    items, check, reader = checked(base, [dora, lora], tmp_path / "out")
    with closing(reader):
        together = check.check_all([(item, NOTHING) for item in items])
        alone = [check.check(item, NOTHING) for item in items]
        plain = {item.name for item in items if item.name.startswith("model.layers.")}
        for elements in (1, 100, 1 << 16):
            assert right_names(items, check, reader, elements).keys() == plain
    assert any(isinstance(item.edits[0].update, Decomposed) for item in items)
    for one, other in zip(together, alone, strict=True):
        assert (one.checked, one.wrong, one.max_ulp) == (other.checked, 0, 0)
        assert one.change == pytest.approx(other.change)
        assert one.rounding == pytest.approx(other.rounding)


def test_rows_are_those_of_a_new_generator(tmp_path):
    """One generator is used again for each weight: rows depend on the weight's seed alone."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    items, _, reader = checked(base, [adapter], tmp_path / "out")
    reader.close()
    for item in items:
        chance, rows = random.Random(f"1/{item.name}"), item.matrix[0]
        sample = {0, rows - 1}
        while len(sample) < min(rows, 18):
            sample.add(int(rows * chance.random()))
        assert sample_rows(item, f"1/{item.name}") == sorted(sample)


@pytest.mark.parametrize("whole", [0, 1, 2, 3])
def test_weights_are_read_in_parts_of_those_whose_factors_are_held(tmp_path, monkeypatch, whole):
    """Rows alone, one whole weight at a time, two or three: of four LoRAs and of four DoRAs, one of each is wrong."""
    base = make_base(tmp_path / "base", torch.bfloat16, layers=4)
    dora = make_adapter(tmp_path / "dora", base, dora=True, targets=("q_proj",))
    lora = make_adapter(tmp_path / "lora", base, dora=False, targets=("up_proj",))
    dora_convert.merge(base.path, [dora, lora], tmp_path / "out")
    names = [f"model.layers.2.{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj")]
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors.keys() & set(names):
            tensors[name] = tensors[name] * 2
        save_file(tensors, file, {"format": "pt"})
    items, check, reader = checked(base, [dora, lora], tmp_path / "out")
    with closing(reader):
        for item in items:
            monkeypatch.setattr(stacks, "WHOLE", -(-whole * item.nbytes // 1024))
            assert (item.name in right_names(items, check, reader, 1024)) == (item.name not in names)


@pytest.mark.parametrize("held", [stacks.HELD_BYTES, 0])
def test_factors_in_float64_outlive_the_next_read(tmp_path, monkeypatch, held):
    """They need no conversion, which elsewhere copies them out of memory that is used again."""
    monkeypatch.setattr(stacks, "HELD_BYTES", held)
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    items, check, reader = checked(base, [adapter], tmp_path / "out")
    with closing(reader):
        assert right_names(items, check, reader).keys() == {item.name for item in items}


def test_a_stack_leaves_out_what_is_off(tmp_path):
    """A weight with one element off, by one ulp or by much, is in no verdict of its stack; the others are."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    items, check, reader = checked(base, [adapter], tmp_path / "out")
    with closing(reader):
        names = right_names(items, check, reader).keys()
        assert names == {item.name for item in items}
        for number, item in enumerate(items):
            written, row = check._written.tensor(item.name), check._rows(item)[number]
            place = written.start + 2 * (row * item.matrix[1] + number)
            right = written.path.read_bytes()
            low, high = right[place], right[place + 1]
            for value in (low ^ 1, high), (low, high ^ 0x80), (0, 0), (0xC0, 0x7F), (0x80, 0x7F):
                written.path.write_bytes(right[:place] + bytes(value) + right[place + 2 :])
                assert right_names(items, check, reader).keys() == names - {item.name}
                verdicts = check.check_all([(each, NOTHING) for each in items])
                assert verdicts[number] == check.check(item, NOTHING)
                assert verdicts[number].max_ulp >= 1
            written.path.write_bytes(right)


@pytest.mark.parametrize("dtype", list(GRID)[:3])
def test_the_room_of_each_matrix_has_the_sign_that_the_definition_gives(dtype):
    """Zeros, subnormal numbers and ties beside usual ones: in one matrix of a stack, and in none."""
    p, least = GRID[dtype]
    x = torch.randn(5, 3, 5, dtype=torch.float64)
    x[1, 0, 0], x[2, 2, 4] = 0.0, 2.0 ** (least - 3) * 1.1
    x[3:, 1, 1] = 1.0 + 2.0**-p
    got = nearest(x, dtype)
    got[4, 1, 1] = 1.0 + 2.0 ** (1 - p)  # the odd neighbour of a tie is as near
    off, written = (got - x).abs(), got.to(TORCH[dtype])

    def has_room(*, quick: bool) -> torch.Tensor:
        return least_room(off, x.clone(), written, out=torch.empty_like(x), quick=quick) > 0

    assert has_room(quick=False).tolist() == [True, True, True, True, False]
    assert [torch.equal(*pair) for pair in zip(got, nearest(x, dtype), strict=True)] == [True, True, True, True, False]
    assert has_room(quick=True).tolist() == [True, True, False, True, False]
    off[0, 2, 2] = float("nan")
    assert has_room(quick=False).tolist() == [False, True, True, True, False]
    assert not has_room(quick=True)[[0, 2, 4]].any()


def test_untrained_weights_and_zeros_are_quick(tmp_path):
    """Rows of zeros, and a B of zeros, whose results are the base's values: all are in a stack, and right."""
    base = make_base(tmp_path / "base")
    for path in base.path.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        for tensor in tensors.values():
            tensor[:1] = 0
        save_file(tensors, path, {"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor * ("lora_B" not in name) for name, tensor in load_file(path).items()}, path)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    items, check, reader = checked(base, [adapter], tmp_path / "out")
    with closing(reader):
        verdicts = right_names(items, check, reader)
    assert verdicts.keys() == {item.name for item in items}
    assert all(verdict.change == verdict.rounding == 0 for verdict in verdicts.values())


def test_one_wrong_tensor_of_a_task(tmp_path, monkeypatch):
    """Of tensors that one task writes, the wrong one alone is named, and alone is written again."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    monkeypatch.setattr(finished, "GROUPS", 1)
    write, written = ShardFiles.write, []

    def flip(self, item, offset, data):
        written.append(item.name)
        if item.name == "model.layers.1.self_attn.k_proj.weight" and len(set(written)) > 1:
            data = memoryview(bytes([data[0], data[1] ^ 0x10]) + bytes(data[2:]))
        write(self, item, offset, data)

    monkeypatch.setattr(ShardFiles, "write", flip)
    with pytest.raises(VerificationError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out", workers=1)
    assert [fault.what for fault in caught.value.faults] == ["model.layers.1.self_attn.k_proj.weight"]
    written.clear()
    assert dora_convert.merge(base.path, adapter, tmp_path / "out", workers=1).resumed
    assert set(written) == {"model.layers.1.self_attn.k_proj.weight"}
    got, want = load(tmp_path / "out"), exact(base, adapter)
    assert all(torch.equal(got[name], rounded(x, torch.bfloat16)) for name, x in want.items())
