"""Many places of files fill many buffers: neighbours, places with gaps between them, the same place twice."""

from __future__ import annotations

import os
import random
from contextlib import closing

import pytest
import torch
from safetensors.torch import save_file

from dora_convert.engine.precision import holds_numbers
from dora_convert.engine.scanning import in_doubt
from dora_convert.errors import MalformedError
from dora_convert.storage import scatter
from dora_convert.storage.reader import Reader
from dora_convert.storage.safetensors import StoredTensor, read_header
from dora_convert.storage.scatter import fill, whole


@pytest.fixture
def files(tmp_path):
    """Two files of random bytes."""
    chance = random.Random(1)
    paths = [tmp_path / "one", tmp_path / "other"]
    for path in paths:
        path.write_bytes(chance.randbytes(100_000))
    return paths


def filled(paths, places):
    """The buffers that `fill` filled."""
    parts = [(paths[number], [(start, memoryview(bytearray(length)))]) for number, start, length in places]
    with closing(Reader()) as reader:
        fill(reader, parts)
    return [bytes(part[1][0][1]) for part in parts]


@pytest.mark.parametrize("way", ["at once", "in short pieces", "as from a store"])
def test_each_buffer_has_its_bytes(files, monkeypatch, way):
    """So it is if the system gives less than was asked for, and for a file that has no descriptor."""
    preadv = os.preadv
    if way == "in short pieces":
        monkeypatch.setattr(os, "preadv", lambda file, buffers, start: preadv(file, [buffers[0][:700]], start))
    monkeypatch.setattr(scatter, "MOST_BUFFERS", 5)
    chance = random.Random(2)
    places = [(chance.randrange(2), chance.randrange(99_000), chance.randrange(1, 1000)) for _ in range(60)]
    places += [(0, 5000 + 100 * k, 100) for k in range(20)] + places[:3] + [(0, 5000, 50), (1, 99_999, 1)]
    chance.shuffle(places)
    if way == "as from a store":
        monkeypatch.setattr(Reader, "is_remote", lambda *_: True)
    data = [path.read_bytes() for path in files]
    assert filled(files, places) == [data[number][start : start + length] for number, start, length in places]


def test_neighbours_are_one_place(files):
    """Neighbours of one file are; a gap, another order and another file are not."""
    starts = [(0, 100), (0, 200), (0, 300), (0, 500), (0, 400), (1, 500), (0, 600), (0, 700)]
    tensors = [StoredTensor(str(k), "U8", (100,), files[number], start) for k, (number, start) in enumerate(starts)]
    buffer = memoryview(bytearray(100 * len(starts)))
    places = list(whole(tensors, buffer))
    assert [(path, place[0], len(place[1])) for path, (place,) in places] == [
        (files[number], start, length)
        for number, start, length in ((0, 100, 300), (0, 500, 100), (0, 400, 100), (1, 500, 100), (0, 600, 200))
    ]
    with closing(Reader()) as reader:
        fill(reader, places)
    data = [path.read_bytes() for path in files]
    assert bytes(buffer) == b"".join(data[number][start : start + 100] for number, start in starts)


def test_near_places_are_one_call(files, monkeypatch):
    """The bytes between two places that are near each other are read along."""
    preadv, calls = os.preadv, []

    def noted(descriptor, buffers, start):
        calls.append(start)
        return preadv(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", noted)
    near = scatter.NEAR_BYTES
    filled(files, [(0, 10, 20), (0, 30, 20), (0, 50 + near, 10), (0, 61 + 2 * near, 10), (1, 0, 1)])
    assert calls == [10, 61 + 2 * near, 0]


def test_a_file_that_ends_first(files):
    """It is an error, and no loop without end."""
    with pytest.raises(MalformedError, match="became shorter"):
        filled(files, [(0, 99_990, 20)])


@pytest.mark.parametrize("damaged", [{}, {3: "nan"}, {0: "inf", 7: "nan"}])
def test_damaged_tensors_among_many(tmp_path, damaged):
    """Neighbours of one dtype are looked at together, and each of a damaged run alone: the same are named."""
    tensors = {f"{k:02}": torch.ones(5, dtype=[torch.float32, torch.bfloat16][k // 4 % 2]) for k in range(20)}
    for k, value in damaged.items():
        tensors[f"{k:02}"][1] = float(value)
    save_file(tensors, tmp_path / "one.safetensors")
    stored = list(read_header(tmp_path / "one.safetensors").tensors.values())
    with closing(Reader()) as reader:
        found = in_doubt(stored, reader, holds_numbers)
    runs = [{k for k in range(20) if k // 4 % 2 == dtype} for dtype in (0, 1)]  # the file has one dtype after the other
    names = {f"{each:02}" for k in damaged for run in runs if k in run for each in run}
    assert [each.name for each in found] == [each.name for each in stored if each.name in names]
