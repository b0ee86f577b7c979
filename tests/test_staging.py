"""The path of a GPU on a processor: large blocks, read ahead, left factors kept, results finished one block behind."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dora_convert
from dora_convert import MalformedError, NumericalError, UsageError, VerificationError
from dora_convert.engine import run as engine_run
from dora_convert.engine.device_buffers import DeviceBuffers
from dora_convert.engine.device_plan import DEVICE_MEMORY, fit_settings
from dora_convert.engine.precision import ComputeSpec
from dora_convert.engine.staging import read_ahead
from dora_convert.output.finished import Task, in_turn
from dora_convert.parity.self_check import SelfCheck, sample_rows
from dora_convert.plan import large_blocks
from dora_convert.plan.item import Item
from dora_convert.plan.large_blocks import LargeItem
from dora_convert.settings import Settings
from dora_convert.storage import reader as reading
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.reader import Reader
from dora_convert.storage.refs import local_source
from dora_convert.storage.safetensors import StoredTensor

from .toy import contents, embeddings_and_head, exact, load, make_adapter, make_base, rounded

CPU = torch.device("cpu")


@pytest.fixture
def staged(monkeypatch):
    """Every run computes as on a device; a block has 16 rows or a few more."""
    sent = []
    send = DeviceBuffers.send

    def note(self, *args):
        sent.append(self.staged)
        return send(self, *args)

    monkeypatch.setattr(engine_run, "choose", lambda *_: ComputeSpec(CPU, torch.float64, "test", stages=True))
    monkeypatch.setattr(LargeItem, "block_elements", 16 * 72)
    monkeypatch.setattr(large_blocks, "CHECKING", 0)
    monkeypatch.setattr(DeviceBuffers, "send", note)
    return sent


def in_small_blocks(monkeypatch):
    """Cut the blocks of a processor as the fixture cuts those of a device."""
    monkeypatch.undo()
    monkeypatch.setattr(reading, "BLOCK_ELEMENTS", 16 * 72)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dora", [True, False])
def test_staged_results_are_exact(tmp_path, staged, dtype, dora):
    """Every element is the float64 result, rounded once, and the self-check agrees."""
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(tmp_path / "adapter", base, dora=dora)
    report = dora_convert.merge(base.path, adapter, tmp_path / "out", workers=2)
    assert all(staged)
    assert len(staged) > len(base.tensors)  # tensors of several blocks
    assert report.verified.wrong_elements == 0
    for name, x in exact(base, adapter).items():
        assert torch.equal(load(tmp_path / "out")[name], rounded(x, dtype)), name


@pytest.mark.parametrize("undo", ["norms", "exact", "none"])
def test_staged_bytes_are_those_of_the_same_blocks(tmp_path, staged, monkeypatch, undo):
    """Reading ahead, finishing late and keeping factors change no byte, record and receipt included."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    for workers in (1, 3):
        dora_convert.merge(base.path, adapter, tmp_path / f"staged{workers}", workers=workers, undo=undo)
    assert staged
    in_small_blocks(monkeypatch)
    dora_convert.merge(base.path, adapter, tmp_path / "plain", device="cpu", undo=undo)
    plain = contents(tmp_path / "plain")
    assert contents(tmp_path / "staged1") == contents(tmp_path / "staged3") == plain


def test_staged_embeddings_replacements_and_columns(tmp_path, staged, monkeypatch):
    """Two passes over a tensor, saved modules, norms along columns, several adapters, and the way back."""
    base = make_base(tmp_path / "base")
    extra = embeddings_and_head()
    first = make_adapter(tmp_path / "one", base, dora=True, extra=extra)
    second = make_adapter(tmp_path / "two", base, dora=False, seed=8)
    adapters = [first, second]
    report = dora_convert.merge(base.path, adapters, tmp_path / "staged", undo="exact")
    assert report.verified.wrong_elements == 0
    assert staged
    back = dora_convert.unmerge(tmp_path / "staged", adapters, tmp_path / "back")
    assert back.exact["tensors"] == back.exact["bit_exact"]
    in_small_blocks(monkeypatch)
    dora_convert.merge(base.path, adapters, tmp_path / "plain", device="cpu", undo="exact")
    assert dora_convert.unmerge(tmp_path / "staged", adapters, tmp_path / "here", device="cpu").exact == back.exact
    for name, tensor in load(tmp_path / "plain").items():
        assert torch.equal(load(tmp_path / "staged")[name], tensor), name
        assert torch.equal(load(tmp_path / "back")[name], load(tmp_path / "here")[name]), name


@pytest.mark.parametrize("method", ["chain", "ties", "dare"])
def test_staged_methods(tmp_path, staged, monkeypatch, method):
    """Methods that prune, draw or chain give the same values."""
    base = make_base(tmp_path / "base")
    adapters = [make_adapter(tmp_path / f"{seed}", base, dora=True, seed=seed) for seed in (1, 2)]
    options = {"method": method, **({} if method == "chain" else {"density": 0.5})}
    assert not dora_convert.merge(base.path, adapters, tmp_path / "staged", **options).verified.wrong_elements
    assert staged or method != "chain"  # others may be made in one pass
    in_small_blocks(monkeypatch)
    dora_convert.merge(base.path, adapters, tmp_path / "plain", device="cpu", **options)
    for name, tensor in load(tmp_path / "plain").items():
        assert torch.equal(load(tmp_path / "staged")[name], tensor), name


def test_staged_adapters_out(tmp_path, staged):
    """to-lora, extract and from-lora read their weights through the same buffers."""
    base = make_base(tmp_path / "base")
    dora, lora = (make_adapter(tmp_path / f"{kind}", base, dora=kind) for kind in (True, False))
    dora_convert.merge(base.path, dora, tmp_path / "out")
    assert dora_convert.to_lora(base.path, dora, tmp_path / "to", rank=40).relative_error < 1e-2
    assert dora_convert.extract(base.path, tmp_path / "out", tmp_path / "from", rank=40).modules
    assert dora_convert.from_lora(base.path, lora, tmp_path / "dora").modules
    assert dict(dora_convert.iter_merged(base.path, dora)).keys() == load(tmp_path / "out").keys()


def test_the_self_check_runs_on_the_device(tmp_path, staged, monkeypatch):
    """The check gets the worker's device, and finds an element that the device got wrong in any block."""
    devices = []
    check = SelfCheck.check_all
    monkeypatch.setattr(
        SelfCheck, "check_all", lambda self, finished, device: devices.append(device) or check(self, finished, device)
    )
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, tmp_path / "right")
    assert set(devices) == {CPU}
    send, first = DeviceBuffers.send, []

    def spoilt(self, x, *rest):
        """Change the last row of the third block."""
        first.append(x)
        x[-1, 0] += (len(first) == 3) * x[-1, 0].abs()
        return send(self, x, *rest)

    monkeypatch.setattr(DeviceBuffers, "send", spoilt)
    with pytest.raises(VerificationError):
        dora_convert.merge(base.path, adapter, tmp_path / "wrong", workers=1)


def test_rows_of_large_blocks_are_sampled_as_often(tmp_path, staged):
    """The ends of a processor's blocks are looked at, too."""
    item = Item("w", "BF16", (4096, 4096), *[StoredTensor("w", "BF16", (4096, 4096), tmp_path, 0)] * 2)
    large = LargeItem(**vars(item))
    assert set(sample_rows(item, "")) - set(sample_rows(large, "")) == set()
    assert {row for start, stop in large.spans() for row in (start, stop - 1)} <= set(sample_rows(large, ""))


def test_staged_faults_are_found(tmp_path, staged):
    """Overflow, and NaN in the base, end the run while further blocks are being read; nothing is published."""
    base = make_base(tmp_path / "base", torch.float16)
    adapter = make_adapter(tmp_path / "adapter", base, dora=False, lora_alpha=10**9)
    with pytest.raises(NumericalError, match="overflows F16"):
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_default_budget_is_a_devices(tmp_path, staged, run, monkeypatch):
    """A tensor whose block takes more than a processor's default is merged without an option, by either interface."""
    monkeypatch.setattr(large_blocks, "TEMPORARY", 1 << 20)
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert run("merge", base.path, adapter, tmp_path / "again", "--quiet")[0] == 0
    assert run("merge", base.path, adapter, tmp_path / "third", "--max-memory", "160MiB")[0] == 2


@pytest.mark.parametrize("undo", ["norms", "exact"])
def test_the_budget_covers_the_buffers(tmp_path, staged, monkeypatch, undo):
    """All buffers of a worker, the ring included, are within the cost of the costliest tensor."""
    held, plans = [], []
    start, begin = DeviceBuffers.__init__, engine_run.Run.__post_init__
    monkeypatch.setattr(DeviceBuffers, "__init__", lambda self, *args: held.append(self) or start(self, *args))
    monkeypatch.setattr(engine_run.Run, "__post_init__", lambda self: plans.append(self.plan) or begin(self))
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, tmp_path / "out", workers=1, undo=undo)
    nbytes = [buffer.numel() for buffers in held for buffer in buffers._buffers.values()]
    assert any(name.startswith("in 3") for buffers in held for name in buffers._buffers)  # a whole ring
    assert plans[0].memory / 3 < sum(nbytes) <= plans[0].memory


def test_the_bench_compares_bytes(tmp_path, monkeypatch):
    """bench/gpu.py builds its models, and finds the bytes of a device and of a processor the same."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "bench")
    gpu, verbs = import_module("gpu"), import_module("gpu_verbs")
    try:
        table = gpu.Table()
        bench = verbs.Bench("cpu", tmp_path, table, 1)
        bench.build(1, 64)
        bench.compare_bytes()
        assert not table.failed
        assert sum(line.endswith("| yes |") for line in table.lines) == 4
    finally:
        for name in ("gpu", "gpu_verbs", "synthetic"):
            sys.modules.pop(name)


def test_read_ahead_yields_every_block(tmp_path, monkeypatch):
    """All rows in order; two blocks are valid at a time, and only two are read ahead."""
    base = make_base(tmp_path / "base")
    stored = open_checkpoint(local_source(base.path)).tensors["model.layers.0.mlp.up_proj.weight"]
    whole = load_file(stored.path)[stored.name]
    reads, reader = [], Reader()
    read = reader.read
    monkeypatch.setattr(reader, "read", lambda *args: (reads.append(args[1]), read(*args))[1])
    buffers = DeviceBuffers(ComputeSpec(CPU, torch.float64, "test", stages=True), reader)
    before, spans = None, [(start, min(start + 7, len(whole))) for start in range(0, len(whole), 7)]
    for number, (start, stop, raw) in enumerate(read_ahead(stored, spans, buffers)):
        assert torch.equal(raw, whole[start:stop])
        assert before is None or torch.equal(*before)
        assert len(reads) <= number + 3
        before = raw, whole[start:stop]
    assert len(reads) == len(spans)
    reader.close()


def test_read_ahead_reports_a_short_file(tmp_path):
    """An error in a reader's thread is the error of the block."""
    base = make_base(tmp_path / "base")
    stored = open_checkpoint(local_source(base.path)).tensors["model.layers.0.mlp.up_proj.weight"]
    stored.path.write_bytes(stored.path.read_bytes()[: stored.start + 100])
    buffers = DeviceBuffers(ComputeSpec(CPU, torch.float64, "test", stages=True), Reader())
    with pytest.raises(MalformedError, match="became shorter"):
        list(read_ahead(stored, [(0, 16), (16, 32), (32, 48)], buffers))


def test_large_blocks_count_in_the_budget(tmp_path, staged, monkeypatch):
    """A budget below one block is refused, with the least; the default is one for devices."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    with pytest.raises(UsageError, match="does not hold one block") as error:
        dora_convert.merge(base.path, adapter, tmp_path / "out", max_memory=1000)
    assert "MiB' is the least" in str(error.value)
    settings = Settings(device="cuda", max_memory=1, default_memory=True, workers=2)
    fit_settings(ComputeSpec(CPU, torch.float64, "test", stages=True), settings)
    assert settings.max_memory == DEVICE_MEMORY
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 2000))
    fit_settings(ComputeSpec(torch.device("cuda", 0), torch.float64, "test", stages=True), settings)
    assert settings.max_memory == 900


def test_workers_beyond_the_budget_are_told(tmp_path, staged, monkeypatch):
    """No worker takes turns for memory on a device; the bytes stay."""
    monkeypatch.setattr(large_blocks, "CHECKING", 3 << 20)
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    said: list[str] = []
    dora_convert.merge(base.path, adapter, tmp_path / "one", workers=1)
    dora_convert.merge(base.path, adapter, tmp_path / "few", workers=16, max_memory="8MiB", on_notice=said.append)
    assert any(text.startswith("workers: 2, as ") for text in said), said
    assert contents(tmp_path / "one") == contents(tmp_path / "few")


def test_tasks_take_shards_in_turn():
    """Threads that write into one file wait for each other, so neighbours have different ones."""
    tasks = [Task("write", shard, (name,)) for shard, name in ("aw", "ax", "ay", "bz")]
    assert [(task.shard, *task.names) for task in in_turn(tasks)] == [("a", "w"), ("b", "z"), ("a", "x"), ("a", "y")]
