"""Merge a small model with nothing but the installed wheel: no numpy, and python -W error makes any warning fail."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

NAME = "base_model.model.model.fc.lora_{}.weight"


def save(path: Path, tensors: dict[str, tuple[tuple[int, ...], list[float]]]) -> None:
    """Write float32 tensors as safetensors, by hand: safetensors itself needs numpy for it."""
    header, data = {}, b""
    for name, (shape, values) in tensors.items():
        body = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(body)]}
        data += body
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def main() -> None:
    """Write base and adapter, merge them on the command line and in Python, and compare."""
    os.chdir(tempfile.mkdtemp())
    for name in ("base", "adapter"):
        Path(name).mkdir()
    save(Path("base/model.safetensors"), {"model.fc.weight": ((4, 3), [1.0] * 12)})
    Path("base/config.json").write_text(json.dumps({"model_type": "llama"}))
    factors = {NAME.format("A"): ((1, 3), [1.0] * 3), NAME.format("B"): ((4, 1), [1.0] * 4)}
    save(Path("adapter/adapter_model.safetensors"), factors)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["fc"]}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))

    words = [sys.executable, "-W", "error", "-m", "dora_convert", "merge", "base", "adapter", "out"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    assert Path("out/model.safetensors").read_bytes()[-48:] == struct.pack("<12f", *[2.0] * 12)

    import dora_convert

    report = dora_convert.merge("base", "adapter", "again")
    assert report.tensors["merged"] == 1
    assert all(tensor.eq(2).all() for _, tensor in dora_convert.iter_merged("base", "adapter"))
    print(f"Python {sys.version.split()[0]}, numpy {bool(find_spec('numpy'))}: merged without a warning")


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
