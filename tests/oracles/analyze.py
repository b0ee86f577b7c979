"""Compare analyze with the merged weights of the tools that trained adapters.

    python -m tests.oracles.analyze CASES

CASES has a folder for each case: base/, adapter/, truth.safetensors (the merged weights by the tool's own forward)
and meta.json (`options`: words of the command line that the files do not hold). ΔM and ΔD of every module are
computed from base and truth in float64, by their definitions. A refusal is printed, never passed over; the exit code
is 1 if a figure is off by more than a millionth.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import dora_convert

TOLERANCE = 1e-6
TINY = 1e-9  # 1 - cos of what did not turn is rounding, here and there


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a base; those of a pipeline's components begin with the component's folder."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        prefix = "" if file.parent == folder else f"{file.parent.relative_to(folder).as_posix()}/"
        found |= {prefix + name: tensor for name, tensor in load_file(file).items()}
    return found


def options(meta: dict[str, Any]) -> dict[str, Any]:
    """Options as keywords."""
    words = iter(meta.get("options", ()))
    found = {word.removeprefix("--").replace("-", "_"): next(words) for word in words}
    return {name: float(value) if name in ("alpha", "scaling") else value for name, value in found.items()}


def error(point: Any, before: torch.Tensor, after: torch.Tensor) -> float:
    """The relative error of ΔM and ΔD against their definitions."""
    W, V = (tensor.double().flatten(1) for tensor in (before, after))
    magnitude = (V.norm(dim=1) - W.norm(dim=1)).abs().mean().item()
    direction = (1 - torch.nn.functional.cosine_similarity(W, V, dim=1, eps=0)).mean().item()
    pairs = ((point.delta_magnitude, magnitude), (point.delta_direction, direction))
    return max(abs(ours - theirs) / max(theirs, TINY) for ours, theirs in pairs)


def check(case: Path) -> float | None:
    """The largest error of a case; None if it is refused."""
    try:
        report = dora_convert.analyze(
            case / "base", case / "adapter", **options(json.loads((case / "meta.json").read_text()))
        )
    except dora_convert.DoraConvertError as refusal:
        sys.stdout.write(f"refused  {case.name:30}{str(refusal).splitlines()[0]}" + "\n")
        return None
    base, truth = weights(case / "base"), load_file(case / "truth.safetensors")
    worst, without = 0.0, 0
    for point in report.points:
        name = next(name for name in (f"{point.module}.weight", point.module) if name in base)
        after = truth.get(name, truth.get(name.rpartition("/")[2]))
        if after is None:
            without += 1
        else:
            worst = max(worst, error(point, base[name], after))
    words = f"{len(report.points) - without} modules, {report.tuned[0].kind}; {without} that truth lacks"
    sys.stdout.write(f"{worst:.1e}  {case.name:30}{words}\n")
    return worst


def main(cases: str) -> None:
    found = [check(case) for case in sorted(Path(cases).iterdir()) if (case / "meta.json").exists()]
    measured = [error for error in found if error is not None]
    if not measured:
        sys.exit(f"{cases} has no case that can be measured: folders with a meta.json")
    sys.stdout.write(f"{len(measured)} of {len(found)} cases measured, largest error {max(measured):.1e}" + "\n")
    sys.exit(max(measured) > TOLERANCE)


if __name__ == "__main__":
    main(*sys.argv[1:])
