"""Every kind of update in small blocks: stored either way, for some outputs, with norms of every sort, and taken out."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dora_convert.adapters import Decomposed, LowRank, Transform
from dora_convert.adapters.kinds import Computed, Dense, Hadamard, Kronecker, Modulated, Sparse, Tucker
from dora_convert.adapters.rotations import Rotated
from dora_convert.engine.device_buffers import DeviceBuffers
from dora_convert.engine.precision import ComputeSpec
from dora_convert.engine.tensor import MergeMaker
from dora_convert.parity.expected import Expected
from dora_convert.plan.item import Edit, Item
from dora_convert.plan.undo_part import Undo
from dora_convert.storage.reader import Reader
from dora_convert.storage.safetensors import StoredTensor, read_header
from dora_convert.storage.spool import Spool
from dora_convert.undo.expected_base import ExpectedBase
from dora_convert.undo.keep import UndoKeeper
from dora_convert.undo.recover import RecoveryMaker

SPEC = ComputeSpec(torch.device("cpu"), torch.float64, "test")
OUT, IN, RANK = 48, 24, 3


def randoms() -> dict[str, Tensor]:
    """Every tensor that the kinds need, of fixed shapes."""
    torch.manual_seed(5)
    shapes = {
        "W": (OUT, IN), "A": (RANK, IN), "B": (OUT, RANK), "A2": (RANK, IN), "B2": (OUT, RANK), "one": (6, 4), "other": (8, 6),
        "left": (8, 2), "right": (2, 6), "core": (RANK, 2, 1), "coreA": (2, IN), "dense": (OUT, IN), "values": (30,),
        "upper": (6, 6), "stages": (2, 6, 4, 4), "u": (IN, 4), "outputs": (12, 4, 4), "butterfly": (3, 12, 4, 4), "b": (OUT,),
        "d": (RANK,), "m": (OUT,), "mc": (IN,),
    }  # fmt: skip
    tensors = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    places = torch.randperm(OUT * IN)[:30]
    return {**tensors, "index": torch.stack([places // IN, places % IN]).int()}


def kinds(files: dict[str, StoredTensor]) -> dict[str, Transform]:
    """One update of each kind."""
    low, second = LowRank(files["A"], files["B"], 1.0), LowRank(files["A2"], files["B2"], 1.0)
    factors = LowRank(files["right"], files["left"], 1.0)
    return {
        "vera": replace(low, scale=1.0, b=files["b"], d=files["d"]),
        "loha": Hadamard(low, second, 1.5),
        "lokr": Kronecker(files["one"], files["other"], 0.7),
        "lokr of factors": Kronecker(files["one"], factors, 0.7),
        "core": Tucker(files["core"], files["coreA"], files["B"], 2.0, transposed=None),
        "dense": Dense(files["dense"], 0.5, transposed=None),
        "sparse": Sparse(files["values"], files["index"], 2.0),
        "hira": Modulated(low),
        "c3a-like": Computed("MiSS", (("block", files["B2"]),), 1.0, shape=(OUT, IN)),
        "oft": Rotated(files["upper"], "oft", terms=5),
        "boft": Rotated(files["stages"], "boft"),
        "hra": Rotated(files["u"], "hra"),
        "diag-oft": Rotated(files["outputs"], "diag-oft", limit=2.0),
        "butterfly": Rotated(files["butterfly"], "butterfly"),
    }


def definition(kind: str, t: dict[str, Tensor]) -> Tensor:
    """V (out, in) of W, written out."""
    W, BA = t["W"], t["B"] @ t["A"]
    if kind == "vera":
        return W + t["b"][:, None] * (t["B"] @ (t["d"][:, None] * t["A"]))
    if kind in ("oft", "boft", "hra", "diag-oft", "butterfly"):
        return W @ turning(kind, t) if kind in ("oft", "boft", "hra") else turning(kind, t) @ W
    if kind == "hira":
        return W * (1 + BA)
    sparse = torch.zeros(OUT, IN, dtype=W.dtype)
    sparse[t["index"][0].long(), t["index"][1].long()] = t["values"]
    block = t["B2"].repeat(1, 1)  # (out as r, r as out): MiSS's block is (r, out)
    delta = {
        "loha": 1.5 * BA * (t["B2"] @ t["A2"]),
        "lokr": 0.7 * torch.kron(t["one"], t["other"]),
        "lokr of factors": 0.7 * torch.kron(t["one"], t["left"] @ t["right"]),
        "core": 2.0 * torch.einsum("mnt,om,ni->oi", t["core"], t["B"], t["coreA"]),
        "dense": 0.5 * t["dense"],
        "sparse": 2.0 * sparse,
        "c3a-like": torch.stack([block[i % OUT, torch.arange(OUT) % RANK] for i in range(IN)], 1),
    }
    return W + delta[kind]


def turning(kind: str, t: dict[str, Tensor]) -> Tensor:
    """The matrix that turns inputs from the right, or outputs from the left."""
    if kind == "hra":
        R = torch.eye(IN, dtype=t["u"].dtype)
        for u in t["u"].T:
            R = R @ (torch.eye(IN, dtype=u.dtype) - 2 * torch.outer(u, u) / (u @ u))
        return R
    if kind == "oft":
        blocks = []
        for upper in t["upper"]:
            Q = torch.zeros(4, 4, dtype=upper.dtype)
            Q[torch.triu_indices(4, 4, 1).unbind()] = upper
            Q = Q - Q.T
            blocks.append(torch.eye(4, dtype=Q.dtype) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q)
        return torch.block_diag(*blocks).T
    one = torch.eye(4, dtype=t["stages"].dtype)
    if kind == "diag-oft":
        Q = t["outputs"] - t["outputs"].mT
        Q = Q * min(1.0, 2.0 / float(Q.norm() + 1e-8))
        return torch.block_diag(*[((one + q) @ torch.linalg.inv(one - q)).T for q in Q])
    if kind == "butterfly":
        total = torch.eye(OUT, dtype=one.dtype)
        for k, stage in enumerate(t["butterfly"]):
            R = torch.block_diag(*[(one + q - q.T) @ torch.linalg.inv(one - q + q.T) for q in stage])
            P = torch.eye(OUT, dtype=one.dtype)[torch.arange(OUT).view(-1, 2, 2**k * 2).mT.flatten()]
            total = P.T @ R @ P @ total
        return total
    total = torch.eye(IN, dtype=one.dtype)
    for k, stage in enumerate(t["stages"]):
        R = torch.block_diag(*[(one - (q - q.T) / 2) @ torch.linalg.inv(one + (q - q.T) / 2) for q in stage])
        order = []
        for start in range(0, IN, 4 * 2**k):
            halves = [range(start + h, start + h + 2) for h in range(0, 4 * 2**k, 2)]
            order += [place for half in halves[0::2] + halves[1::2] for place in half]
        P = torch.eye(IN, dtype=one.dtype)[torch.tensor(order)]
        total = P @ R @ P.T @ total
    return total.T


def with_magnitudes(how: str, V: Tensor, inner: Transform | None, t: dict[str, Tensor], files: dict[str, StoredTensor]):
    """The update with magnitudes, and its W'."""
    m, mc = t["m"] + 1, t["mc"] + 1
    if how == "none":
        return inner, V
    if how == "rows":
        return Decomposed(inner, files["m"], offset=1.0), m[:, None] * V / V.norm(dim=1, keepdim=True)
    if how == "columns":
        return Decomposed(inner, files["mc"], axis="columns", offset=1.0), mc * V / V.norm(dim=0)
    if how == "scaled rows":
        return Decomposed(inner, files["m"], normalised=True, offset=1.0), m[:, None] * V
    return Decomposed(inner, files["mc"], axis="columns", normalised=True, offset=1.0), mc * V


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    path = tmp_path_factory.mktemp("kinds") / "x.safetensors"
    tensors = randoms()
    save_file({**tensors, "turned": tensors["W"].T.contiguous()}, path)
    return {name: t.double() for name, t in tensors.items()}, dict(read_header(path).tensors)


HOW = ("none", "rows", "columns", "scaled rows", "scaled columns")
NAMES = (
    "vera", "loha", "lokr", "lokr of factors", "core", "dense", "sparse", "hira", "c3a-like", "oft", "boft", "hra",
    "diag-oft", "butterfly",
)  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("transposed", [False, True])
def test_merged_checked_and_taken_out(tmp_path, monkeypatch, everything, kind, transposed):
    """The engine, the independent check and the definition agree, and so do both ways back."""
    monkeypatch.setattr("dora_convert.storage.reader.BLOCK_ELEMENTS", 300)
    t, files = everything
    base = files["turned" if transposed else "W"]
    turn = (lambda x: x.T) if transposed else (lambda x: x)
    with closing(Reader()) as reader, closing(Spool(tmp_path / "spool")) as spool:
        buffers = DeviceBuffers(SPEC, reader)
        for number, how in enumerate(HOW):
            update, wanted = with_magnitudes(how, definition(kind, t), kinds(files)[kind], t, files)
            item = Item("W", "F32", base.shape, base, base, edits=(Edit(update, transposed),), origin="W")
            assert how != "none" or len(list(item.spans())) > 1
            maker = MergeMaker(item, buffers, spool, observe=partial(UndoKeeper, exact=number == 1))
            got = torch.cat([maker.block(buffers.raw(base, *span), *span).clone() for span in item.spans()])
            assert (got - turn(wanted)).norm() < 1e-6 * wanted.norm(), how
            expected = Expected(item, reader)
            rows = list(range(item.matrix[0]))
            x = torch.cat([expected.block(chunk).x for chunk in expected.chunks(rows, 100)])
            assert (x - turn(wanted)).norm() < 1e-12 * wanted.norm(), how
            parts = {part.name: part for part in maker._observer.parts()}
            data = (tmp_path / "spool").read_bytes()
            tensors = {"got": got}
            for name, part in parts.items():
                raw = bytearray(b"".join(data[s.start : s.start + s.length] for s in part.segments))
                tensors[name] = torch.frombuffer(raw, dtype=torch.uint8 if part.dtype == "U8" else torch.float32)
            save_file(tensors, tmp_path / f"{number}.safetensors")
            made = read_header(tmp_path / f"{number}.safetensors").tensors
            undo = Undo((made.get("norm/0/W"),), ulps=made.get("ulps/W"))
            turned = replace(item, source=made["got"], undo=undo)
            recovery = RecoveryMaker(turned, DeviceBuffers(SPEC, reader), spool)
            blocks = [recovery.block(buffers.raw(made["got"], *span), *span).clone() for span in turned.spans()]
            back, W = torch.cat(blocks), turn(t["W"])
            assert torch.equal(back.double(), W) if undo.ulps else (back - W).norm() < 1e-5 * W.norm(), how
            if not undo.ulps:
                again = ExpectedBase(turned, reader)
                x = torch.cat([again.block(chunk).x for chunk in again.chunks(rows, 100)])
                assert (x - back).norm() < 1e-6 * W.norm(), how


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("transposed", [False, True])
def test_some_outputs_of_a_weight(tmp_path, monkeypatch, everything, kind, transposed):
    """Outputs before and behind keep their values; blocks begin and end inside of the edit's outputs."""
    monkeypatch.setattr("dora_convert.storage.reader.BLOCK_ELEMENTS", 300)
    t, files = everything
    whole = torch.cat([torch.randn(7, IN), t["W"].float(), torch.randn(5, IN)])
    save_file({"W": whole.T.contiguous() if transposed else whole}, tmp_path / "w.safetensors")
    base = read_header(tmp_path / "w.safetensors").tensors["W"]
    with closing(Reader()) as reader, closing(Spool(tmp_path / "spool")) as spool:
        for how in ("none", "rows", "scaled rows"):
            update, V = with_magnitudes(how, definition(kind, t), kinds(files)[kind], t, files)
            wanted = torch.cat([whole[:7].double(), V, whole[-5:].double()])
            edit = Edit(update, transposed, outputs=(7, 7 + OUT))
            item = Item("W", "F32", base.shape, base, base, edits=(edit,), origin="W")
            maker = MergeMaker(item, buffers := DeviceBuffers(SPEC, reader), spool)
            got = torch.cat([maker.block(buffers.raw(base, *span), *span).clone() for span in item.spans()])
            expected, rows = Expected(item, reader), list(range(item.matrix[0]))
            x = torch.cat([expected.block(chunk).x for chunk in expected.chunks(rows, 100)])
            for result, bound in ((got, 1e-6), (x, 1e-12)):
                assert ((result.T if transposed else result) - wanted).norm() < bound * wanted.norm(), how


def test_a_norm_without_the_scaling(tmp_path, everything):
    """HF adapters' f = m/‖W + BA‖ with W' = f(W + sBA); magnitudes alone have no addend."""
    t, files = everything
    low = LowRank(files["A"], files["B"], 2.5)
    V, m = t["W"] + 2.5 * t["B"] @ t["A"], t["m"]
    n = (t["W"] + t["B"] @ t["A"]).norm(dim=1)
    cases = {
        (m / n)[:, None] * V: Decomposed(low, files["m"], norm_scale=1.0),
        (m / t["W"].norm(dim=1))[:, None] * t["W"]: Decomposed(None, files["m"]),
    }
    with closing(Reader()) as reader, closing(Spool(tmp_path / "spool")) as spool:
        for wanted, update in cases.items():
            for transposed in (False, True):
                base = files["turned" if transposed else "W"]
                item = Item("W", "F32", base.shape, base, base, edits=(Edit(update, transposed),), origin="W")
                maker = MergeMaker(item, buffers := DeviceBuffers(SPEC, reader), spool)
                got = torch.cat([maker.block(buffers.raw(base, *span), *span).clone() for span in item.spans()])
                x = Expected(item, reader).block(range(item.matrix[0])).x
                for result, bound in ((got, 1e-6), (x, 1e-12)):
                    assert ((result.T if transposed else result) - wanted).norm() < bound * wanted.norm()
