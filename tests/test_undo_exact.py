"""merge --undo exact and unmerge: every tensor and every side file of the base, bit for bit."""

from __future__ import annotations

import os

import pytest
import torch

import dora_convert
from dora_convert.errors import DoraConvertError

from . import toy
from .peft_cases import prepared
from .test_peft_matrix import CASES, noisy

HALF = ("bfloat16", "float16", "float32")
EVERY = bool(os.environ.get("EVERY_DTYPE"))
KINDS = [
    (name, dtype)
    for number, (name, case) in enumerate(CASES.items())
    for dtype in (HALF if EVERY or len(case.dtypes) > 1 else HALF[number % 3 :][:1])
]


def same_as(base, again):
    """The base's files, and its tensors byte for byte."""
    want, got = toy.contents(base), toy.contents(again)
    for files in (want, got):
        for name in [name for name in files if name.endswith((".safetensors", ".bin"))]:
            del files[name]
    assert got == want
    tensors, found = toy.load(base), toy.load(again)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_every_kind_comes_back(tmp_path, name, dtype):
    """Whatever PEFT trains, the base comes back bit for bit, and the report proves it."""
    with noisy():
        prepared(CASES[name], dtype, tmp_path)
    CASES[name].edit(tmp_path / "adapter")
    try:
        dora_convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", undo="exact")
    except DoraConvertError:
        if CASES[name].may_refuse:
            return
        raise
    report = dora_convert.unmerge(tmp_path / "out", tmp_path / "adapter", tmp_path / "again")
    same_as(tmp_path / "base", tmp_path / "again")
    assert report.exact["tensors"] == report.exact["bit_exact"] > 0
    assert report.verified.wrong_elements == 0
