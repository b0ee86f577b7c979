"""Edits of some outputs of a stored weight, and factors that are views: merged, checked and taken out again."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_convert.adapters import Decomposed, Delta, LowRank
from dora_convert.engine.device_buffers import DeviceBuffers
from dora_convert.engine.precision import ComputeSpec, read_columns, read_rows
from dora_convert.engine.tensor import MergeMaker
from dora_convert.parity.expected import Expected
from dora_convert.plan.item import Edit, Item
from dora_convert.plan.undo_part import Undo
from dora_convert.storage.reader import Reader
from dora_convert.storage.safetensors import StoredTensor, read_header
from dora_convert.storage.spool import Spool
from dora_convert.storage.stored_view import StoredView, view
from dora_convert.undo.expected_base import ExpectedBase
from dora_convert.undo.keep import UndoKeeper
from dora_convert.undo.recover import RecoveryMaker

from .toy import rounded

SPEC = ComputeSpec(torch.device("cpu"), torch.float64, "test")
ROWS, COLUMNS, RANK = 56, 20, 3


def stored(path, tensors: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    """Write tensors, and return their headers."""
    save_file(tensors, path)
    return dict(read_header(path).tensors)


@pytest.fixture
def reader():
    with closing(Reader()) as reader:
        yield reader


VIEWS = [
    {"rows": range(4, 9)},
    {"rows": (5, 0, 0, 11)},
    {"columns": range(1, 8, 3)},
    {"columns": range(2, 6), "rows": range(3, 12)},
    {"turned": True},
    {"turned": True, "rows": (7, 2, 3), "columns": range(0, 8, 2)},
]


@pytest.mark.parametrize("cut", VIEWS)
def test_a_view_reads_like_the_tensor_it_shows(tmp_path, reader, monkeypatch, cut):
    """Rows, columns, whole tensors and bytes of a view are those of the part of the tensor that it shows."""
    monkeypatch.setattr("dora_convert.storage.reader.PIECE_BYTES", 10)
    whole = torch.randn(12, 8, dtype=torch.float64).bfloat16()
    shown = view(stored(tmp_path / "x.safetensors", {"x": whole})["x"], **cut)
    rows, columns = list(cut.get("rows", range(12))), list(cut.get("columns", range(8)))
    expected = whole[rows][:, columns]
    expected = expected.T.contiguous() if cut.get("turned") else expected
    assert isinstance(shown, StoredView)
    assert shown.shape == shown.matrix == tuple(expected.shape)
    buffers = DeviceBuffers(SPEC, reader)
    assert torch.equal(buffers.stored(shown), expected)
    assert torch.equal(buffers.raw(shown, 1, 3), expected[1:3])
    assert torch.equal(buffers.columns(shown, 1, 3), expected[:, 1:3].double())
    assert torch.equal(read_rows(reader, shown, [2, 0]), expected[[2, 0]])
    assert torch.equal(read_columns(reader, shown, [1, 0]), expected[:, [1, 0]])
    data = b"".join(map(bytes, reader.pieces(shown)))
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(expected.shape), expected)
    again = stored(tmp_path / "y.safetensors", {"y": expected})["y"]
    assert reader.same_bytes(shown, again)
    inner = view(shown, rows=range(1, 3), columns=(1, 0))
    assert torch.equal(buffers.stored(inner), expected[1:3][:, [1, 0]])


def test_a_view_of_a_vector_shows_elements(tmp_path, reader):
    """Elements of a vector in any order are a vector; a convolution's rows keep their other dimensions."""
    m, A = torch.randn(9), torch.randn(6, 4, 3)
    files = stored(tmp_path / "x.safetensors", {"m": m, "A": A})
    shown = view(view(files["m"], rows=(8, 1, 4, 0)), rows=range(1, 4))
    assert (shown.shape, shown.matrix) == ((3,), (1, 3))
    assert torch.equal(DeviceBuffers(SPEC, reader).whole(shown), m[[1, 4, 0]].double()[None])
    assert view(files["A"], rows=range(2, 4)).shape == (2, 4, 3)
    assert view(files["A"]) is files["A"]
    with pytest.raises(ValueError, match="9 rows"):
        view(files["m"], rows=range(5, 10))


def test_a_strided_factor_is_read_once_for_all_experts(tmp_path):
    """The parts of B for each expert come from one read of the whole; a worker keeps at most two."""
    reads = []

    class Counting(Reader):
        def read(self, path, offset, buffer):
            reads.append(len(buffer))
            super().read(path, offset, buffer)

    B, C, D = (torch.randn(10, 4 * RANK) for _ in range(3))
    files = stored(tmp_path / "x.safetensors", {"B": B, "C": C, "D": D})
    with closing(Counting()) as reader:
        buffers = DeviceBuffers(SPEC, reader)
        for expert in range(4):
            for name, whole in (("B", B), ("C", C)):
                shown = view(files[name], columns=range(expert, 4 * RANK, 4))
                assert torch.equal(buffers.whole(shown), whole[:, expert::4].double())
        assert reads == [B.nbytes, C.nbytes]
        buffers.whole(view(files["D"], columns=range(0, 4 * RANK, 4)))
        buffers.whole(view(files["C"], columns=range(0, 4 * RANK, 4)))
        assert reads == [B.nbytes, C.nbytes, D.nbytes]
        buffers.forget()
        buffers.whole(view(files["D"], columns=range(0, 4 * RANK, 4)))
        assert len(reads) == 4


CUTS = ((0, 24), (24, 40), (40, 56))


def cut_item(tmp_path, *, transposed: bool, dora: bool, weights=(1.0, 1.0, 1.0), cuts=CUTS):
    """Return an item of edits on its own outputs each, the result in float64, and the base's tensor."""
    torch.manual_seed(3)
    W = (0.1 * torch.randn(ROWS, COLUMNS)).bfloat16()
    W[2, 3] = -0.0
    tensors, x, original = {"W": W.T.contiguous() if transposed else W}, W.double(), W.double()
    for k, (first, last) in enumerate(cuts):
        A, B = 0.3 * torch.randn(RANK, COLUMNS), 0.3 * torch.randn(last - first, RANK)
        V = original[first:last] + 1.5 * B.double() @ A.double()
        m = V.norm(dim=1).float() * (1 + 0.3 * torch.randn(last - first))
        new = m[:, None].double() * V / V.norm(dim=1, keepdim=True) if dora else V
        x[first:last] += weights[k] * (new - original[first:last])
        tensors |= {f"A{k}": A, f"B{k}": B, f"m{k}": m}
    files = stored(tmp_path / "x.safetensors", tensors)
    edits = []
    for k, outputs in enumerate(cuts):
        low = LowRank(files[f"A{k}"], files[f"B{k}"], 1.5)
        update = Decomposed(low, files[f"m{k}"]) if dora else low
        edits.append(Edit(update, transposed, weights[k], outputs))
    base = files["W"]
    item = Item("W", "BF16", base.shape, base, base, edits=tuple(edits), origin="W")
    return item, (x.T.contiguous() if transposed else x), tensors["W"]


def merge(item: Item, reader: Reader, spool: Spool, **options) -> tuple[torch.Tensor, MergeMaker]:
    """Return the merged tensor."""
    maker = MergeMaker(item, DeviceBuffers(SPEC, reader), spool, **options)
    blocks = [maker.block(maker._buffers.raw(item.source, *span), *span).clone() for span in item.spans()]
    return torch.cat(blocks), maker


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gaps", [False, True])
def test_edits_on_their_own_outputs_round_once(tmp_path, reader, monkeypatch, transposed, dora, gaps):
    """Each output is changed by its own edit alone, with its own norm; outputs of no edit keep their bits."""
    monkeypatch.setattr("dora_convert.storage.reader.BLOCK_ELEMENTS", 300)
    cuts = (CUTS[0], (30, 41)) if gaps else CUTS
    item, x, W = cut_item(tmp_path, transposed=transposed, dora=dora, cuts=cuts)
    assert len(list(item.spans())) > 1
    with closing(Spool(tmp_path / "spool")) as spool:
        got, _ = merge(item, reader, spool)
    assert torch.equal(got, rounded(x, torch.bfloat16))
    if gaps:
        outside = slice(41, None)
        own = (got[:, outside], W[:, outside]) if transposed else (got[outside], W[outside])
        assert torch.equal(*(each.contiguous().view(torch.int16) for each in own))
    expected = Expected(item, reader)
    rows = list(range(item.matrix[0]))
    assert torch.allclose(torch.cat([expected.block(chunk).x for chunk in expected.chunks(rows)]), x, rtol=1e-13)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 1.25)])
def test_edits_on_their_own_outputs_are_taken_out_again(tmp_path, reader, monkeypatch, transposed, exact, weights):
    """The record holds the norms of each edit's outputs; an exact one gives the base's bits back."""
    monkeypatch.setattr("dora_convert.storage.reader.BLOCK_ELEMENTS", 300)
    item, _, W = cut_item(tmp_path, transposed=transposed, dora=True, weights=weights, cuts=(CUTS[0], (30, 41)))
    with closing(Spool(tmp_path / "spool")) as spool:
        observe = partial(UndoKeeper, exact=exact)
        got, maker = merge(item, reader, spool, observe=observe)
        parts = {part.name: part for part in maker._observer.parts()}
        assert [parts[f"norm/{k}/W"].shape for k in (0, 1)] == [(24,), (11,)]
        tensors = {"got": got}
        for name, part in parts.items():
            data = b"".join((tmp_path / "spool").read_bytes()[s.start : s.start + s.length] for s in part.segments)
            dtype = torch.uint8 if part.dtype == "U8" else torch.float32
            tensors[name] = torch.frombuffer(bytearray(data), dtype=dtype).view(part.shape)
        files = stored(tmp_path / "y.safetensors", tensors)
        undo = Undo((files["norm/0/W"], files["norm/1/W"]), ulps=files.get("ulps/W"))
        turned = replace(item, source=files["got"], undo=undo)
        recovery = RecoveryMaker(turned, DeviceBuffers(SPEC, reader), spool)
        spans = list(turned.spans())
        back = torch.cat([recovery.block(recovery._buffers.raw(files["got"], *span), *span).clone() for span in spans])
    if exact:
        assert torch.equal(back.view(torch.int16), W.view(torch.int16))
    assert torch.allclose(back.double(), W.double(), rtol=0.01, atol=8e-3)
    again = ExpectedBase(turned, reader)
    rows = list(range(turned.matrix[0]))
    predicted = torch.cat([again.block(chunk).x for chunk in again.chunks(rows)])
    assert torch.allclose(predicted, W.double(), rtol=0.01, atol=8e-3)


def test_a_bias_of_some_outputs(tmp_path, reader):
    """A bias's delta for some elements leaves the others as they are."""
    files = stored(tmp_path / "x.safetensors", {"b": torch.randn(10), "d": torch.randn(4)})
    item = Item("b", "F32", (10,), files["b"], files["b"], edits=(Edit(Delta(files["d"], 0.5), outputs=(3, 7)),))
    values = load_file(tmp_path / "x.safetensors")
    values["b"][3:7] += 0.5 * values["d"]
    with closing(Spool(tmp_path / "spool")) as spool:
        got, _ = merge(item, reader, spool)
    assert torch.equal(got[0], values["b"])
    assert torch.allclose(Expected(item, reader).block([0]).x[0], values["b"].double(), atol=1e-6)
