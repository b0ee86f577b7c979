"""The quick way of verify: it confirms the nearest value and nothing else, and reports are those of the slow way."""

from __future__ import annotations

import itertools
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.engine.precision import TORCH, nearest
from dora_convert.parity import tensor as comparing
from dora_convert.parity.confirming import PATIENCE, Confirmation, are_nearest
from dora_convert.parity.tensor import compare_all
from dora_convert.plan.plan import Options
from dora_convert.plan.planner import make_plan
from dora_convert.sources import Session
from dora_convert.sources.inputs import open_inputs
from dora_convert.storage.reader import Reader
from dora_convert.storage.safetensors import read_header

from .toy import make_adapter, make_base

BITS = {"BF16": torch.int16, "F16": torch.int16, "F32": torch.int32}


def confirmed(got, x, dtype) -> bool:
    got, x = (torch.tensor([[value]], dtype=torch.float64) for value in (got, x))
    return are_nearest(got, x, got.to(TORCH[dtype]), torch.empty_like(x))


@pytest.mark.parametrize("dtype", list(BITS))
def test_only_the_nearest_value_is_confirmed(dtype):
    """Around powers of two, zero, subnormals and the largest number: each neighbour of x, and x between them."""
    finfo = torch.finfo(TORCH[dtype])
    places = [1.0, 1.0 + finfo.eps, 1.5, 2.0 - finfo.eps, 3.0, finfo.max, finfo.tiny, finfo.tiny * finfo.eps, 0.0]
    for place, sign in itertools.product(places, (1, -1)):
        middle = torch.tensor([sign * place]).to(TORCH[dtype])
        near = [(middle.view(BITS[dtype]) + step).view(TORCH[dtype]).double().item() for step in (-1, 0, 1)]
        values = [value for value in (*near, -middle.double().item()) if abs(value) < float("inf")]
        centre = middle.double().item()
        for part in (0.0, 0.01, 0.49, 0.499999, 0.500001, 0.51, 0.99):
            x = centre + part * (near[2] - centre) if near[2] in values else centre * (1 - part * finfo.eps / 4)
            right = nearest(torch.tensor([x], dtype=torch.float64), dtype).item()
            for got in values:
                assert confirmed(got, x, dtype) == (got == right), (got, x)
    for lower, unit in (
        (1.0, finfo.eps),
        (1.0 + finfo.eps, finfo.eps),
        (0.0, least := finfo.tiny * finfo.eps),
        (least, least),
    ):
        tie, values = lower + unit / 2, (lower, lower + unit)
        even = nearest(torch.tensor([tie], dtype=torch.float64), dtype).item()
        assert [confirmed(got, tie, dtype) for got in values] == [got == even for got in values]


def test_what_is_no_number_is_not_confirmed():
    for got, x in itertools.product((float("nan"), float("inf"), 1.0), (float("nan"), float("inf"), 1.0, 1e300)):
        assert confirmed(got, x, "BF16") == (got == x == 1.0)


def opened(tmp_path, dtype=torch.bfloat16, *, dora=True, factors=torch.float32):
    """Return pairs of changed weights and their written tensors."""
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(tmp_path / "adapter", base, dora=dora)
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(factors) for name, tensor in load_file(file).items()}, file)
    out = tmp_path / "out"
    dora_convert.merge(base.path, adapter, out)
    checkpoint, adapters = open_inputs(str(base.path), [str(adapter)], Session(), out=str(out))
    plan = make_plan(checkpoint, adapters, [1.0], Options())
    written = {}
    for path in out.glob("*.safetensors"):
        written |= read_header(path).tensors
    return [(item, written[item.name]) for item in plan.items if item.changed]


def both_ways(item, written, reader, monkeypatch, elements):
    """Return the report on a tensor of both ways."""
    quick = compare_all(item, written, reader, 3, elements=elements)
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "kind_of", lambda _: None)
        return quick, compare_all(item, written, reader, 3, elements=elements)


def assert_alike(one, other):
    for name in ("output_error", "output_floor"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-12)
    assert replace(one, output_error=0, output_floor=0) == replace(other, output_error=0, output_floor=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32, torch.float64])
def test_both_ways_report_the_same(tmp_path, monkeypatch, dtype, dora, factors):
    pairs = opened(tmp_path, dtype, dora=dora, factors=factors)
    confirms, answers = Confirmation.confirms, []
    monkeypatch.setattr(
        Confirmation, "confirms", lambda self, rows: answers.append(confirms(self, rows)) or answers[-1]
    )
    with closing(Reader()) as reader:
        for (item, written), elements in itertools.product(pairs, (1, 200, 1 << 18)):
            assert_alike(*both_ways(item, written, reader, monkeypatch, elements))
    assert answers
    assert all(answers)


@pytest.mark.parametrize("elements", [200, 1 << 18])
def test_one_element_anywhere_is_found(tmp_path, monkeypatch, elements):
    """In a corner, at the end of a block or inside: one ulp, another sign, NaN, infinity; and nothing else is off."""
    (item, written), *_ = opened(tmp_path)
    rows, columns = item.matrix
    right = written.path.read_bytes()
    with closing(Reader()) as reader:
        for row, column in ((0, 0), (rows - 1, columns - 1), (200 // columns, 0), (rows // 2, columns // 3)):
            place = written.start + 2 * (row * columns + column)
            low, high = right[place], right[place + 1]
            for value in (low ^ 1, high), (low, high ^ 0x80), (0xC0, 0x7F), (0x80, 0x7F):
                written.path.write_bytes(right[:place] + bytes(value) + right[place + 2 :])
                quick, slow = both_ways(item, written, reader, monkeypatch, elements)
                assert (quick.wrong_elements, quick.max_ulp) == (slow.wrong_elements, slow.max_ulp)
                assert quick.max_ulp >= 1
                assert quick.output_error == pytest.approx(slow.output_error, rel=1e-12, nan_ok=True)
            written.path.write_bytes(right)


def test_other_tools_roundings_end_the_trying(tmp_path):
    """After some blocks in vain no further one is tried; a confirmed one gives new patience."""
    (item, written), *_ = opened(tmp_path)
    right = written.path.read_bytes()
    with closing(Reader()) as reader:
        quick = Confirmation(item, written, reader, torch.randn(item.matrix[1], 2, dtype=torch.float64))
        written.path.write_bytes(
            right[: written.start] + bytes(2 * item.matrix[1]) + right[written.start + 2 * item.matrix[1] :]
        )
        assert not quick.confirms(range(1))
        assert quick.confirms(range(1, 2))
        assert not quick.outputs[:, :, 0].any()
        assert quick.outputs[:, :, 1].all()
        for _ in range(PATIENCE):
            assert not quick.confirms(range(1))
        assert not quick.confirms(range(1, 2))
