"""Adapters that the real tools wrote: merged as the tool computes, verified, and taken out again bit for bit.

tests/golden/formats holds them with their truth, the tool's own forward; make.py there copied them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dora_convert

from .golden.formats.make import probes

GOLDEN = Path(__file__).parent / "golden/formats"
CASES = json.loads((GOLDEN / "cases.json").read_text())
TRUTH = load_file(GOLDEN / "truth.safetensors")


def adapter_of(case: str) -> Path:
    """The only file of a case, else its folder."""
    files = list((GOLDEN / case).iterdir())
    return files[0] if len(files) == 1 else GOLDEN / case


def options_of(case: str) -> dict[str, object]:
    """The options that the files themselves do not hold."""
    words = CASES[case]["options"]
    return {name[2:].replace("-", "_"): float(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model; those of a pipeline by component and name."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        inside = file.relative_to(folder).parts
        if inside[0] != "dora_convert":
            found |= {"/".join([*inside[:-1], name]): tensor for name, tensor in load_file(file).items()}
    return found


@pytest.mark.parametrize("case", CASES)
def test_merged_as_the_tool_computes(tmp_path, case):
    """Within 1e-6 of the tool's own forward; verify agrees, and unmerge restores the base bit for bit."""
    base, adapter, options = GOLDEN / CASES[case]["base"], adapter_of(case), options_of(case)
    notices: list[str] = []
    dora_convert.merge(base, adapter, tmp_path / "out", undo="exact", on_notice=notices.append, **options)
    assert len(notices) == len(set(notices))
    before, merged = tensors_of(base), tensors_of(tmp_path / "out")
    touched = set()
    for name, wanted in TRUTH.items():
        if name.startswith(f"{case}:"):
            _, tensor, side = name.split(":")
            touched.add(tensor)
            assert (probes(merged[tensor])[side] - wanted).norm() < 1e-6 * wanted.norm(), name
    assert touched
    assert merged.keys() == before.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in before.items() if name not in touched)
    assert dora_convert.verify(base, adapter, tmp_path / "out", **options).verdict == "agree"
    dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    after = tensors_of(tmp_path / "back")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("case", CASES)
def test_inspect_names_the_format(case):
    """An adapter, with the rank or the shape of each module; nothing is refused with the case's options."""
    report = dora_convert.inspect(adapter_of(case), **options_of(case))
    assert report.kind == "adapter"
    assert report.refused is None
    assert report.modules
