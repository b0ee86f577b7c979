"""Measure the peak resident memory of merges that should all need the same.

    python memory.py [--folder bench/build]

The first model has 1.24 B parameters in five shards. The others have twice its layers, one shard, or rank
256. The last model is a single tensor of 1 GB, merged row by row and, as an embedding, column by column.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from merge import HERE, run
from safetensors.torch import save_file
from synthetic import write_config

ROWS, COLUMNS, RANK = 131072, 4096, 16


def write_large(folder: Path, *, embedding: bool) -> None:
    """Write a checkpoint of one tensor of 1 GB, and a DoRA on the tensor."""
    (folder / "base").mkdir(parents=True)
    (folder / "dora").mkdir()
    weight = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16).normal_(std=0.02)
    name = "model.embed_tokens" if embedding else "lm_head"
    save_file({f"{name}.weight": weight}, folder / "base/model.safetensors", {"format": "pt"})
    prefix, outputs = f"base_model.model.{name}", COLUMNS if embedding else ROWS
    inputs = ROWS if embedding else COLUMNS
    parts = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    tensors = {
        f"{prefix}.{parts[0]}": torch.randn(RANK, inputs) * 0.02,
        f"{prefix}.{parts[1]}": torch.randn(outputs, RANK) * 0.01,
        f"{prefix}.lora_magnitude_vector": 0.02 * inputs**0.5 * (1 + 0.05 * torch.randn(outputs)),
    }
    save_file(tensors, folder / "dora/adapter_model.safetensors")
    write_config(folder / "dora", RANK, dora=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE / "build" / "memory")
    parser.add_argument("--large", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    root = chosen.folder
    if chosen.large:  # in its own process, because a child begins with its parent's peak
        write_large(root, embedding=chosen.large == "True")
        return
    cases = {
        "1.24 B, 5 shards, r=16": [],
        "twice the layers": ["--layers", "32", "--shards", "10"],
        "one shard of 2.5 GB": ["--shards", "1"],
        "r=256": ["--rank", "256"],
        "1 GB head, DoRA": False,
        "1 GB embedding, DoRA": True,
        "--undo exact": [],
        "--undo exact, r=256": ["--rank", "256"],
    }
    for title, made in cases.items():
        shutil.rmtree(root, ignore_errors=True)
        if isinstance(made, bool):
            subprocess.run([sys.executable, __file__, "--large", str(made), "--folder", str(root)], check=True)
        else:
            subprocess.run([sys.executable, str(HERE / "synthetic.py"), str(root), *made], check=True)
        words = ["merge", str(root / "base"), str(root / "dora"), str(root / "out"), "-q"]
        words += ["--undo", "exact"] if title.startswith("--undo exact") else []
        seconds, peak = run([sys.executable, "-m", "dora_convert", *words], root / "out")
        print(f"{title:24} {peak / 1e6:6.0f} MB {seconds:6.1f} s", flush=True)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
