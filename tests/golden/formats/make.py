"""Copy adapters that the real tools wrote, and their truth, into this folder: `make.py CASES`.

CASES holds a folder for each adapter: `base/`, `adapter/`, `meta.json`, and `truth.safetensors`, the merged weights by
the tool's own forward in float64. Bases that are alike are kept once. Of the truth, two products with fixed vectors
are kept, T·x and yᵀ·T: they show a wrong element of T as surely as T itself, and take a tenth of the space.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent


def probes(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The products of a tensor, as a matrix, with a fixed vector on either side."""
    T = tensor.double().reshape(tensor.shape[0], -1)
    y, x = (torch.cos(3.0 * torch.arange(size, dtype=torch.float64) + 1) for size in T.shape)
    return {"right": T @ x, "left": y @ T}


def main(cases: Path) -> None:
    bases: dict[str, str] = {}
    truth: dict[str, torch.Tensor] = {}
    table: dict[str, dict[str, object]] = {}
    for case in sorted(path for path in cases.iterdir() if path.is_dir()):
        files = sorted(path for path in (case / "base").rglob("*.safetensors"))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        name = bases.setdefault(digest, f"base-{len(bases)}")
        if not (HERE / name).exists():
            shutil.copytree(case / "base", HERE / name)
        shutil.copytree(case / "adapter", HERE / case.name, dirs_exist_ok=True)
        meta = json.loads((case / "meta.json").read_text())
        table[case.name] = {"base": name, "source": meta["source"], "options": meta["options"]}
        for key, tensor in load_file(case / "truth.safetensors").items():
            truth |= {f"{case.name}:{key}:{side}": value for side, value in probes(tensor).items()}
    save_file(truth, HERE / "truth.safetensors")
    (HERE / "cases.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
