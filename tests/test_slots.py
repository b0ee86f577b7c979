"""Weights of the running model that lie in several stored tensors, or in part of one, with a hand-written map."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert.adapters import Full, LowRank, Rows
from dora_convert.errors import PlanError
from dora_convert.naming.resolve import NameResolver
from dora_convert.naming.slots import Slot
from dora_convert.plan import planner
from dora_convert.plan.cutting import cut
from dora_convert.storage.reader import Reader
from dora_convert.storage.safetensors import StoredTensor, read_header

from .toy import load, rounded, write_json, write_shards

SIZES = (("q", 8), ("k", 4), ("v", 4))
E, H, INNER, RANK, SCALE = 3, 20, 28, 4, 1.5
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
EXPERTS = "layers.0.mlp.experts."
GATE_UP = [
    Slot(f"{EXPERTS}{e}.w{k}.weight", ((0, INNER), (INNER, 2 * INNER))[k == 3], expert=e, experts=E)
    for k in (1, 3)
    for e in range(E)
]
SLOTS = {
    f"{EXPERTS}gate_up_proj": GATE_UP,
    f"{EXPERTS}down_proj": [Slot(f"{EXPERTS}{e}.w2.weight", expert=e, experts=E) for e in range(E)],
    "layers.0.attn.qkv_proj.weight": [
        Slot("layers.0.attn.q.weight", (0, 24)),
        Slot("layers.0.attn.k.weight", (24, 32)),
        Slot("layers.0.attn.v.weight", (32, 40)),
    ],
    "layers.0.attn.qkv_proj.bias": [
        Slot("layers.0.attn.q.bias", (0, 24)),
        Slot("layers.0.attn.k.bias", (24, 32)),
        Slot("layers.0.attn.v.bias", (32, 40)),
    ],
    "layers.0.cross.q_proj.weight": [Slot("layers.0.cross.qkv.weight", part=(0, 12))],
    "layers.0.cross.v_proj.weight": [Slot("layers.0.cross.qkv.weight", part=(24, 36))],
    "layers.0.turned.weight": [Slot("layers.0.turned_on_disk", transposed=True)],
    "layers.0.rotary.weight": [Slot("layers.0.rotary_on_disk", order=ORDER)],
    "layers.0.renamed.weight": [Slot("layers.0.other_name.weight")],
}
MODULES = [name.removesuffix(".weight") for name in SLOTS if name.endswith(".weight")]


class HandWritten:
    """A map of the toy model's names."""

    def stored(self, target: str) -> tuple[Slot, ...] | None:
        return tuple(SLOTS[target]) if target in SLOTS else None

    def running(self, name: str) -> str | None:
        return next((weight for weight, slots in SLOTS.items() for slot in slots if slot.name == name), None)


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """Give every resolver the map."""
    every = lambda tree, adapters, options: [  # noqa: E731
        NameResolver(tree.tensors, planner._targets(adapter, options), HandWritten()) for adapter in adapters
    ]
    monkeypatch.setattr(planner, "_resolvers", every)


def on_disk() -> dict[str, torch.Tensor]:
    """The toy base's tensors."""
    torch.manual_seed(5)
    sizes = {"w1": (INNER, H), "w2": (H, INNER), "w3": (INNER, H)}
    shapes = {f"{EXPERTS}{e}.{name}.weight": size for e in range(E) for name, size in sizes.items()}
    shapes |= {f"layers.0.attn.{name}.weight": (rows, H) for name, rows in (("q", 24), ("k", 8), ("v", 8))}
    shapes |= {f"layers.0.attn.{name}.bias": (rows,) for name, rows in (("q", 24), ("k", 8), ("v", 8))}
    shapes |= {"layers.0.cross.qkv.weight": (36, H), "layers.0.turned_on_disk": (H, 14)}
    shapes |= {"layers.0.rotary_on_disk": (8, H), "layers.0.other_name.weight": (10, H), "norm.weight": (H,)}
    return {name: (0.1 * torch.randn(shape)).bfloat16() for name, shape in shapes.items()}


def in_model(disk: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The running model's weights, in float64."""
    weights = {}
    for name, slots in SLOTS.items():
        pieces = []
        for slot in slots:
            piece = disk[slot.name].double()
            piece = piece[slice(*slot.part)] if slot.part else piece
            piece = piece.T if slot.transposed else piece
            if slot.order:
                piece = torch.stack([piece[slot.order.index(k)] for k in range(len(piece))])
            pieces.append(piece)
        if slots[0].experts:
            columns = [torch.stack(pieces[k : k + E]) for k in range(0, len(pieces), E)]
            weights[name] = torch.cat(columns, 1)
        else:
            weights[name] = torch.cat(pieces)
    return weights


def back(weights: dict[str, torch.Tensor], disk: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stored tensors of the running model's weights, in float64."""
    stored = {name: tensor.double() for name, tensor in disk.items()}
    for name, slots in SLOTS.items():
        for slot in slots:
            piece = weights[name][slot.expert] if slot.experts else weights[name]
            piece = piece[slice(*slot.outputs)] if slot.outputs else piece
            piece = piece[list(slot.order)] if slot.order else piece
            piece = piece.T if slot.transposed else piece
            if slot.part:
                stored[slot.name][slice(*slot.part)] = piece
            else:
                stored[slot.name] = piece
    return stored


def toy(tmp_path: Path, *, dora: bool, experts: bool) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Write the base and an adapter in the running model's names; return both, and the result in float64."""
    disk = on_disk()
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    write_shards(base, disk, 2)
    write_json(base / "config.json", {"architectures": ["ToyForCausalLM"], "model_type": "toy"})
    weights, tensors = in_model(disk), {}
    for module in MODULES:
        weight = weights[f"{module}.weight"]
        A, B = torch.randn(RANK, weight.shape[1]), 0.01 * torch.randn(weight.shape[0], RANK)
        V = weight + SCALE * B.double() @ A.double()
        tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
        if dora:
            m = V.norm(dim=1).float() * (1 + 0.2 * torch.randn(len(V)))
            tensors[f"{module}.lora_magnitude_vector"] = m
            V = m.double()[:, None] * V / V.norm(dim=1, keepdim=True)
        weights[f"{module}.weight"] = V
    for parameter, wrapper in (("gate_up_proj", ".base_layer"), ("down_proj", "")) if experts else ():
        weight = weights[f"{EXPERTS}{parameter}"]
        A, B = torch.randn(E * RANK, weight.shape[2]), 0.1 * torch.randn(weight.shape[1], RANK * E)
        tensors |= {f"{EXPERTS[:-1]}{wrapper}.lora_A.weight": A, f"{EXPERTS[:-1]}{wrapper}.lora_B.weight": B}
        for e in range(E):
            weight[e] += SCALE * B[:, e::E].double() @ A[e * RANK : (e + 1) * RANK].double()
    if not dora:
        bias = torch.randn(40)
        tensors["layers.0.attn.qkv_proj.base_layer.bias"] = bias
        weights["layers.0.attn.qkv_proj.bias"] = bias.double()
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    fields = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]} if experts else {}
    write_json(
        adapter / "adapter_config.json",
        {
            "peft_type": "LORA", "r": RANK, "lora_alpha": RANK * SCALE, "use_dora": dora, "target_modules": MODULES,
            "bias": "none" if dora else "lora_only", "peft_version": "0.21.2", **fields,
        },
    )  # fmt: skip
    return base, adapter, back(weights, disk)


@pytest.mark.parametrize(("dora", "experts"), [(False, True), (True, False)])
def test_an_adapter_in_the_models_names_is_merged_into_the_stored_tensors(tmp_path, dora, experts):
    """OUT has the base's names, shapes and shards; every element is the definition's, rounded once."""
    base, adapter, expected = toy(tmp_path, dora=dora, experts=experts)
    report = dora_convert.merge(base, adapter, tmp_path / "out", undo="exact")
    merged, disk = load(tmp_path / "out"), on_disk()
    for name, x in expected.items():
        assert torch.equal(merged[name], rounded(x, torch.bfloat16)), name
    index = "model.safetensors.index.json"
    tables = [json.loads((folder / index).read_text())["weight_map"] for folder in (base, tmp_path / "out")]
    assert tables[0] == tables[1]
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: x.shape for n, x in disk.items()}
    into = {entry["tensor"]: entry["into"] for entry in report.ledger}
    if experts:
        name = f"base_model.model.{EXPERTS[:-1]}.base_layer.lora_B.weight"
        assert set(into[name]) == {slot.name for slot in GATE_UP}
    assert dora_convert.verify(base, adapter, tmp_path / "out").verdict == "agree"
    dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    again = load(tmp_path / "back")
    assert all(torch.equal(again[name], tensor) for name, tensor in disk.items())


def change(adapter: Path, **tensors: torch.Tensor) -> None:
    """Replace tensors of an adapter, by the ends of their names."""
    path = adapter / "adapter_model.safetensors"
    found = load_file(path)
    for end, tensor in tensors.items():
        name = next(name for name in found if name.endswith(end.replace("__", ".")))
        found[name] = tensor
    save_file(found, path)


def test_what_cannot_be_cut_is_refused_by_name(tmp_path):
    """Factors of other sizes or counts of experts, and magnitudes on experts, name the tensors and the reason."""
    base, adapter, _ = toy(tmp_path, dora=False, experts=True)
    change(
        adapter, qkv_proj__lora_B__weight=torch.randn(41, RANK), experts__lora_B__weight=torch.randn(H + 1, RANK * E)
    )
    with pytest.raises(PlanError) as caught:
        dora_convert.merge(base, adapter, tmp_path / "out")
    faults = {fault.what.removeprefix("base_model.model.layers.0."): fault.why for fault in caught.value.faults}
    assert "41 outputs" in faults["attn.qkv_proj.lora_B.weight"]
    assert "3 experts of shape (20, 28)" in faults["mlp.experts.lora_B.weight"]
    assert not (tmp_path / "out").exists()


def test_a_map_that_does_not_cover_a_weight_is_refused(tmp_path, monkeypatch):
    """A missing expert, a gap between outputs, or an overlap: the base's tensors make no whole weight."""
    base, adapter, _ = toy(tmp_path, dora=False, experts=True)
    monkeypatch.setitem(SLOTS, f"{EXPERTS}down_proj", SLOTS[f"{EXPERTS}down_proj"][:2])
    monkeypatch.setitem(SLOTS, "layers.0.attn.qkv_proj.weight", SLOTS["layers.0.attn.qkv_proj.weight"][::2])
    with pytest.raises(PlanError) as caught:
        dora_convert.merge(base, adapter, tmp_path / "out")
    reasons = {fault.why for fault in caught.value.faults}
    assert any("make no whole weight" in why for why in reasons)
    assert any("do not make one weight" in why for why in reasons)


def test_two_changes_of_the_same_outputs_are_refused(tmp_path, monkeypatch):
    """Parts of one stored tensor may not overlap within one adapter."""
    base, adapter, _ = toy(tmp_path, dora=False, experts=False)
    monkeypatch.setitem(SLOTS, "layers.0.cross.v_proj.weight", [Slot("layers.0.cross.qkv.weight", part=(11, 23))])
    with pytest.raises(PlanError) as caught:
        dora_convert.merge(base, adapter, tmp_path / "out")
    assert any("changes layers.0.cross.qkv.weight" in fault.why for fault in caught.value.faults)


def test_a_change_of_some_outputs_goes_where_they_lie():
    """An update of some of a weight's outputs is cut at the tensors' borders, with its own numbers."""
    tensors = {f"{name}.weight": StoredTensor(f"{name}.weight", "F32", (rows, 6), Path("x"), 0) for name, rows in SIZES}
    base = SimpleNamespace(tensors=tensors, model_types=frozenset())
    A, B = (StoredTensor(name, "F32", shape, Path("y"), 0) for name, shape in (("A", (2, 6)), ("B", (7, 2))))
    slots = [Slot("q.weight", (0, 8)), Slot("k.weight", (8, 12)), Slot("v.weight", (12, 16))]
    parts = cut(LowRank(A, B, 1.0), slots, base, (6, 13))
    assert [(part.name, part.outputs, part.match.update.B.rows) for part in parts[::2]] == [
        ("q.weight", (6, 8), range(2)),
        ("v.weight", (0, 1), range(6, 7)),
    ]
    assert (parts[1].outputs, parts[1].match.update.B.rows) == (None, range(2, 6))
    assert "does not have" in cut(LowRank(A, B, 1.0), slots, base, (10, 17))
    (part,) = cut(LowRank(A, B, 1.0), [Slot("q.weight")], base, (1, 8))
    assert (part.outputs, part.match.update.B) == ((1, 8), B)


def near(one: Path, other: Path, atol: float) -> None:
    """Two merged folders hold the same weights, up to rounding."""
    mine, theirs = load(one), load(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor.double(), theirs[name].double(), atol=atol, rtol=0.01), name


def test_a_dora_of_a_lora_has_the_norms_of_all_outputs(tmp_path):
    """from-lora joins the norms of the stored tensors in the running model's order."""
    base, adapter, expected = toy(tmp_path, dora=False, experts=False)
    dora_convert.from_lora(base, adapter, tmp_path / "dora")
    made = load_file(tmp_path / "dora/adapter_model.safetensors")
    assert made["base_model.model.layers.0.attn.qkv_proj.lora_magnitude_vector"].shape == (40,)
    norms = in_model({name: x.float() for name, x in expected.items()})["layers.0.rotary.weight"].norm(dim=1)
    assert torch.allclose(made["base_model.model.layers.0.rotary.lora_magnitude_vector"].double(), norms, rtol=1e-5)
    for name in ("adapter", "dora"):
        dora_convert.merge(base, tmp_path / name, tmp_path / f"by {name}")
    near(tmp_path / "by adapter", tmp_path / "by dora", 1e-6)


def test_a_lora_of_a_dora_has_the_change_of_all_outputs(tmp_path):
    """to-lora fits one ΔW to the changes of all stored tensors."""
    base, adapter, _ = toy(tmp_path, dora=True, experts=False)
    report = dora_convert.to_lora(base, adapter, tmp_path / "lora", rank=14, exact_svd=True)
    assert {module.name for module in report.modules} == {f"{module}.weight" for module in MODULES}
    for name in ("adapter", "lora"):
        dora_convert.merge(base, tmp_path / name, tmp_path / f"by {name}")
    full = {module.name for module in report.modules if module.relative_error < 1e-5}
    assert {"layers.0.turned.weight", "layers.0.rotary.weight", "layers.0.cross.q_proj.weight"} <= full
    near_names = ("layers.0.turned_on_disk", "layers.0.rotary_on_disk", "layers.0.cross.qkv.weight")
    mine, theirs = load(tmp_path / "by adapter"), load(tmp_path / "by lora")
    assert all(torch.allclose(mine[name].double(), theirs[name].double(), atol=1e-3) for name in near_names)
    assert report.relative_error < 0.5


def test_tensors_saved_whole_are_cut_too(tmp_path):
    """A stack, rows one below the other, a turned weight and rows of a fused one come from the saved tensor."""
    disk = {name: x.float() for name, x in on_disk().items()}
    saved = {name: torch.randn(weight.shape) for name, weight in in_model(disk).items()}
    for folder, tensors in (("x", disk), ("y", saved)):
        save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / folder)
    base = SimpleNamespace(tensors=read_header(tmp_path / "x").tensors, model_types=frozenset())
    headers, expected = read_header(tmp_path / "y").tensors, back({n: x.double() for n, x in saved.items()}, disk)
    with closing(Reader()) as reader:
        for name, value in headers.items():
            for part in cut(Full(value), SLOTS[name], base):
                update, x = part.match.update, expected[part.name]
                x = x[list(update.index)] if isinstance(update, Rows) else x
                found = torch.frombuffer(
                    bytearray(b"".join(map(bytes, reader.pieces(update.value)))), dtype=torch.float32
                )
                assert torch.equal(found.view(update.value.shape).double(), x), (name, part.name)
