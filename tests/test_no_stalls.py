"""A device without values stands for a card: what asks it for a number fails, and what mixes it with host memory.

torch's meta device computes shapes alone. So a merge on it runs to its end only if no step of a block waits for the
device. Some operations of torch take tensors of both devices, which a card refuses: `OneDevice` refuses them, too.
The bytes mean nothing.
"""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dora_convert
from dora_convert.engine import run as engine_run
from dora_convert.engine.device_buffers import DeviceBuffers
from dora_convert.engine.in_memory import NoSpool
from dora_convert.engine.precision import ComputeSpec
from dora_convert.engine.tensor import MergeMaker
from dora_convert.parity.combined import expected_of
from dora_convert.parity.expected import Expected
from dora_convert.plan.item import Edit, Item
from dora_convert.plan.large_blocks import LargeItem
from dora_convert.storage.reader import Reader
from dora_convert.storage.safetensors import read_header

from . import test_updates as updates
from .test_other_kinds import CASES, GOLDEN, base_of
from .toy import embeddings_and_head, load, make_adapter, make_base

META = torch.device("meta")
SPEC = ComputeSpec(META, torch.float64, "test", stages=True)
KINDS = sorted(case for case in CASES if case.startswith("peft-"))


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, as CUDA does; copies, numbers and indices may cross."""

    crossing = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Look at the operands, and compute."""
        operands = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor) and each.dim()]
        if len({each.device.type for each in operands}) > 1 and func.__name__.split(".")[0] not in self.crossing:
            raise RuntimeError(f"{func} on two devices")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def plans(monkeypatch):
    """Every run computes on the meta device, in several blocks; copies to the host bring ones. Yields the plans."""
    plans = []
    copy = torch.Tensor.copy_

    def bring(self, source, *options, **names):
        return self.fill_(1) if source.is_meta and not self.is_meta else copy(self, source, *options, **names)

    def moved(self, *places, **names):
        on_host = any(str(place) == "cpu" for place in places) and self.is_meta
        dtype = next((place for place in places if isinstance(place, torch.dtype)), self.dtype)
        return torch.ones(self.shape, dtype=dtype) if on_host else to(self, *places, **names)

    to, start = torch.Tensor.to, engine_run.Run.__post_init__
    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.Tensor, "copy_", bring)
    monkeypatch.setattr(DeviceBuffers, "working", lambda _: OneDevice())
    monkeypatch.setattr(LargeItem, "block_elements", 16 * 72)
    monkeypatch.setattr(engine_run, "choose", lambda *_: SPEC)
    monkeypatch.setattr(engine_run.Run, "__post_init__", lambda self: plans.append(self.plan) or start(self))
    return plans


def expect_on_device(plan):
    """Compute the definition of some rows, and the bound, on the meta device."""
    with closing(Reader()) as reader, OneDevice():
        for item in plan.items:
            if item.edits:
                expected, rows = expected_of(item, reader, META), range(min(7, item.matrix[0]))
                x, _ = expected.rows(rows)
                assert x.is_meta
                assert expected.bound(rows, x, rounded_once=True).is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dora", [True, False])
def test_blocks_never_wait(tmp_path, plans, dtype, dora):
    """LoRA and DoRA along rows, in every dtype."""
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(tmp_path / "adapter", base, dora=dora)
    for undo in ("none", "norms", "exact"):
        dora_convert.merge(base.path, adapter, tmp_path / "out", verify=False, undo=undo, overwrite=True)
    assert load(tmp_path / "out").keys() == base.tensors.keys()
    expect_on_device(plans[0])


def test_embeddings_and_several_adapters_never_wait(tmp_path, plans):
    """Norms along columns take two passes, and two adapters a copy of W."""
    base = make_base(tmp_path / "base")
    extra = embeddings_and_head()
    adapters = [make_adapter(tmp_path / "one", base, dora=True, extra=extra)]
    adapters.append(make_adapter(tmp_path / "two", base, dora=True, seed=8))
    dora_convert.merge(base.path, adapters, tmp_path / "out", verify=False, undo="none", weight=[1, 0.5])
    expect_on_device(plans[0])


@pytest.mark.parametrize("case", KINDS)
def test_other_kinds_never_wait(tmp_path, plans, case):
    """Products, rotations, scales and sparse changes."""
    dora_convert.merge(base_of(case), GOLDEN / case, tmp_path / "out", verify=False, undo="none")
    expect_on_device(plans[0])


def test_what_waits_is_found(tmp_path, plans, monkeypatch):
    """The test fails where it should: for a question to the device, and for a tensor left on the host."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    send = DeviceBuffers.send
    for number, fault in enumerate((lambda x: bool(x.sum()), lambda x: x.mul_(torch.ones(len(x), 1)))):
        monkeypatch.setattr(
            DeviceBuffers, "send", lambda self, x, *rest, fault=fault: (fault(x), send(self, x, *rest))[1]
        )
        with pytest.raises((RuntimeError, NotImplementedError)):
            dora_convert.merge(base.path, adapter, tmp_path / f"out{number}", verify=False, undo="none")


WAITS = ("sparse", "diag-oft")
"""Kinds that look for the elements of a block, and that ask for a length once a tensor."""


@pytest.mark.parametrize("kind", [kind for kind in updates.NAMES if kind not in WAITS])
@pytest.mark.parametrize("transposed", [False, True])
def test_no_kind_waits_or_mixes_devices(tmp_path, monkeypatch, kind, transposed):
    """Every kind of update with norms of every sort, and its definition."""
    monkeypatch.setattr("dora_convert.storage.reader.BLOCK_ELEMENTS", 300)
    save_file({**(tensors := updates.randoms()), "turned": tensors["W"].T.contiguous()}, tmp_path / "all.safetensors")
    files = dict(read_header(tmp_path / "all.safetensors").tensors)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    base = files["turned" if transposed else "W"]
    with closing(Reader()) as reader, OneDevice():
        for how in updates.HOW:
            V = torch.zeros(updates.OUT, updates.IN, dtype=torch.float64)
            update, _ = updates.with_magnitudes(how, V, updates.kinds(files)[kind], doubles, files)
            item = Item("W", "BF16", base.shape, base, base, edits=(Edit(update, transposed),), origin="W")
            maker = MergeMaker(item, buffers := DeviceBuffers(SPEC, reader), NoSpool())
            for span in item.spans():
                assert maker.merged(buffers.raw(base, *span), *span).is_meta
            expected = Expected(item, reader, META)
            assert expected.block(range(5)).x.is_meta
