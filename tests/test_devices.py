"""Several devices: workers are dealt over them; one plan, one journal, the same bytes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import dora_convert
from dora_convert import UsageError
from dora_convert.engine import devices as found
from dora_convert.engine.device_buffers import DeviceBuffers
from dora_convert.engine.precision import ComputeSpec, choose
from dora_convert.engine.run import journal_key
from dora_convert.settings import DEVICES

from .toy import contents, make_adapter, make_base


@pytest.fixture
def pair(tmp_path):
    """A base, and a DoRA for it."""
    base = make_base(tmp_path / "base")
    return base.path, make_adapter(tmp_path / "adapter", base, dora=True)


@pytest.fixture
def cards(monkeypatch):
    """Four cards, of which the second is of another model, and the third is the current one."""
    models = ["H100", "A100", "H100", "H100"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(models))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: models[getattr(device, "index", device)])


@pytest.mark.parametrize(
    ("names", "numbers", "title"),
    [
        ("auto", [2, 0, 3], "cuda:2,0,3"),
        ("cuda:0,2", [0, 2], "cuda:0,2"),
        ("cuda:3,cuda:0", [3, 0], "cuda:3,0"),
        ("cuda:0,0,2", [0, 0, 2], "cuda:0,0,2"),
        ("cuda", [0], "cuda:0"),
        ("cuda:1", [1], "cuda:1"),
    ],
)
def test_names_of_devices(cards, names, numbers, title):
    """auto is all cards like the current one; a list is what it says."""
    spec = choose(names)
    assert [device.index for device in spec.devices] == numbers
    assert (spec.title, spec.device) == (title, torch.device("cuda", numbers[0]))
    assert DEVICES.fullmatch(title)


def test_cards_of_another_model_are_told(cards):
    """A card that is left out is told; two models in one list are refused."""
    assert "3 CUDA devices found; 1 of another model left out" in str(choose("auto"))
    with pytest.raises(UsageError, match="A100 and H100 together"):
        choose("cuda:0,1")
    with pytest.raises(UsageError, match="--device cuda:0,9: this machine has 4 usable"):
        choose("cuda:0,9")


def test_a_run_goes_on_with_the_same_model_of_card(cards):
    """Another model may round otherwise, so its run starts again."""
    keys = [journal_key(choose(name), {})["device"] for name in ("cuda:0", "cuda:1", "cuda:2", "cpu")]
    assert keys == ["H100", "A100", "H100", "cpu"]


@pytest.mark.parametrize("names", ["cpu,", "cpu,cuda", "cuda:0,mps", "mps,mps", "cuda,", "0,1", "auto,cpu"])
def test_lists_that_are_refused(tmp_path, pair, names):
    """Devices of two kinds would give bytes that depend on the worker."""
    with pytest.raises(UsageError, match="is not one of"):
        dora_convert.merge(*pair, tmp_path / "out", device=names)


def test_workers_are_dealt_in_turn():
    """Each device gets every second worker; what is named twice gets twice as many."""
    one, two = torch.device("cuda", 0), torch.device("cuda", 1)
    deal = ComputeSpec(one, torch.float64, "", (two, two)).dealt()
    dealt = [deal() for _ in range(6)]
    assert Counter(spec.device for spec in dealt) == {one: 2, two: 4}
    assert {spec.devices for spec in dealt} == {(one,), (two,)}


def test_bytes_do_not_depend_on_devices(tmp_path, pair, monkeypatch):
    """Lanes on two devices write what one writes, under one journal, and all lanes work."""
    made = []
    start = DeviceBuffers.__init__
    monkeypatch.setattr(DeviceBuffers, "__init__", lambda self, *args: (made.append(args[0]), start(self, *args))[1])
    one = dora_convert.merge(*pair, tmp_path / "one", device="cpu", workers=2)
    made.clear()
    two = dora_convert.merge(*pair, tmp_path / "two", device=["cpu", torch.device("cpu")], workers=2)
    assert [spec.devices for spec in made if spec.reason == "as asked"] == [(torch.device("cpu"),)] * 2
    assert (one.device, two.device) == ("cpu", "cpu,cpu")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_other_verbs_take_several_devices(tmp_path, pair, run):
    """Every verb that computes deals its workers; the command line takes the same list."""
    base, adapter = pair
    out, lora = tmp_path / "out", tmp_path / "lora"
    assert run("merge", base, adapter, out, "--device", "cpu,cpu", "--quiet")[0] == 0
    assert dora_convert.verify(base, adapter, out, device="cpu,cpu").verdict == "agree"
    assert dora_convert.unmerge(out, adapter, tmp_path / "back", device="cpu,cpu").device == "cpu,cpu"
    assert dora_convert.to_lora(base, adapter, lora, rank=4, device="cpu,cpu").modules
    assert dora_convert.analyze(base, out, device="cpu,cpu").points
    got = dict(dora_convert.iter_merged(base, adapter, device="cpu,cpu"))
    assert len(got) == len(dict(dora_convert.iter_merged(base, adapter)))


def test_idle_devices_are_told(tmp_path, pair):
    """Fewer workers than devices leave some idle."""
    said = []
    dora_convert.merge(*pair, tmp_path / "out", device="cpu,cpu,cpu", workers=1, on_notice=said.append)
    assert any("3 devices, and only 1 workers" in text for text in said)


def test_spelling():
    """A bare number goes on with CUDA."""
    assert found.spelled_out("cuda:0,1,cuda:3") == ["cuda:0", "cuda:1", "cuda:3"]
