"""Combine several adapters by every method, and compare with PEFT: its merge_utils on dense changes, its own chains.

    python -m tests.oracles.methods [MERGEKIT_PYTHON]

Everything is float64: the base, PEFT's arithmetic and the output. Shapes are not square, magnitudes are perturbed.
Random methods are compared by mean and variance over seeds. With MERGEKIT_PYTHON, the python of an environment that
has mergekit, DELLA's probabilities are compared with mergekit's. The script prints each error and fails above 1e-6.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import dora_convert

MOST = 1e-6
SEEDS = 200
LINEAR = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
SIZES = {"vocab_size": 40, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "head_dim": 20}
Weights = dict[str, torch.Tensor]


def model(path: Path, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """Return the model in a folder."""
    return LlamaForCausalLM.from_pretrained(path, dtype=dtype)


def make_base(path: Path) -> Path:
    """Write a small Llama in float64."""
    config = LlamaConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=2)
    LlamaForCausalLM(config).double().save_pretrained(path)
    return path


def train(base: LlamaForCausalLM, out: Path, *, seed: int, dora: bool = True, rank: int = 4, steps: int = 3) -> Path:
    """Train an adapter for a few steps from factors that are not zero, and write it in float64."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=dora, target_modules=LINEAR)
    trained = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
        elif "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
    optimiser = torch.optim.SGD([each for each in trained.parameters() if each.requires_grad], lr=0.05)
    words = torch.randint(0, SIZES["vocab_size"], (2, 12))
    for _ in range(steps):
        trained(input_ids=words, labels=words).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    trained.save_pretrained(out)
    return out


def merged_by_peft(base: LlamaForCausalLM, adapter: Path) -> LlamaForCausalLM:
    """Merge an adapter into a model in memory."""
    return PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).merge_and_unload()


def weights_of(network: LlamaForCausalLM) -> Weights:
    """Return a copy of a model's weights."""
    return {name: x.detach().clone() for name, x in network.state_dict().items()}


def merged_by_us(base: Path, adapters: list[Path], out: Path, **options: Any) -> Weights:
    """Return the weights of our merge."""
    dora_convert.merge(base, adapters, out, overwrite=True, undo="none", **options)
    return load_file(out / "model.safetensors")


def distance(got: Weights, want: Weights, base: Weights) -> float:
    """Return the largest error of any weight, relative to the change of this weight."""
    errors = [(got[name] - x).norm() / (x - base[name]).norm() for name, x in want.items() if (x != base[name]).any()]
    assert errors
    return float(max(errors))


def chains(folder: Path) -> Iterator[tuple[str, float]]:
    """Compare chains of two and three, each link trained by PEFT on PEFT's merge of those before."""
    for kinds in ((True, True), (True, True, True), (False, True, True), (True, False)):
        base = make_base(folder / "base")
        current, adapters = model(base), []
        for number, dora in enumerate(kinds):
            before = LlamaForCausalLM(current.config).double()
            before.load_state_dict(current.state_dict())
            adapters.append(train(current, folder / f"link{number}", seed=number, dora=dora))
            current = merged_by_peft(before, adapters[-1])
        want, start = weights_of(current), weights_of(model(base))
        title = " then ".join("DoRA" if dora else "LoRA" for dora in kinds)
        yield f"chain {title}", distance(merged_by_us(base, adapters, folder / "out", method="chain"), want, start)
        single = merged_by_us(base, adapters, folder / "out", method="chain", dtype="float32")
        yield (
            f"chain {title}, float32: largest distance",
            float(max((single[name].double() - x).abs().max() for name, x in want.items())),
        )


def changes(base: Path, adapters: list[Path]) -> list[Weights]:
    """Return the dense changes of each adapter, as PEFT merges it."""
    start, found = weights_of(model(base)), []
    for adapter in adapters:
        merged = weights_of(merged_by_peft(model(base), adapter))
        found.append({name: merged[name] - x for name, x in start.items()})
    return found


def combined(start: Weights, deltas: list[Weights], combine: Any) -> Weights:
    """Return every weight, with the changes that PEFT's function combines."""
    return {
        name: x + combine([each[name] for each in deltas]) if deltas[0][name].any() else x for name, x in start.items()
    }


def methods(folder: Path) -> Iterator[tuple[str, float]]:
    """Compare the methods that draw nothing, for many densities, weights and elections."""
    base = make_base(folder / "base")
    adapters = [
        train(model(base), folder / f"a{k}", seed=10 + k, dora=dora, rank=rank)
        for k, (dora, rank) in enumerate(((True, 4), (False, 2), (True, 7)))
    ]
    start, deltas = weights_of(model(base)), changes(base, adapters)
    for weights in ((1.0, 1.0, 1.0), (0.7, -0.4, 1.3)):
        given = torch.tensor(weights, dtype=torch.float64)
        want = combined(start, deltas, lambda x, w=given: merge_utils.task_arithmetic(x, w))
        got = merged_by_us(base, adapters, folder / "out", method="linear", weight=weights)
        yield f"linear, weights {weights}", distance(got, want, start)
        for density in (0.05, 0.2, 0.37, 0.5, 0.9, 1.0):
            options = {"density": density, "weight": weights}
            want = combined(start, deltas, lambda x, w=given, d=density: merge_utils.magnitude_prune(x, w, d))
            got = merged_by_us(base, adapters, folder / "out", method="magnitude-prune", **options)
            yield f"magnitude-prune {density}, weights {weights}", distance(got, want, start)
            for sign in ("total", "frequency"):
                want = combined(start, deltas, lambda x, w=given, d=density, s=sign: merge_utils.ties(x, w, d, s))
                got = merged_by_us(base, adapters, folder / "out", method="ties", majority_sign=sign, **options)
                yield f"ties {density}, {sign}, weights {weights}", distance(got, want, start)


def draws(folder: Path) -> Iterator[tuple[str, float]]:
    """Compare means and variances over seeds, as shares of what chance allows; and bytes of the same seed."""
    base = make_base(folder / "base")
    adapter = train(model(base), folder / "a", seed=3)
    start, (delta,) = weights_of(model(base)), changes(base, [adapter])
    name = "model.layers.0.mlp.up_proj.weight"
    for method, density in itertools.product(("dare", "della"), (0.3, 0.6)):
        options = {"method": method, "density": density, "verify": False}
        drawn = torch.stack(
            [merged_by_us(base, [adapter], folder / "out", seed=seed, **options)[name] for seed in range(SEEDS)]
        )
        drawn, change = drawn - start[name], delta[name]
        p = torch.full_like(change, density)
        if method == "della":  # 0.15 on each side of the density, by the rank in the row
            ranks = change.abs().argsort(1).argsort(1).double() / (change.shape[1] - 1)
            p = density - 0.15 + 0.3 * ranks
        variance = change.square() * (1 - p) / p
        z = (drawn.mean(0) - change) / (variance / SEEDS).sqrt()
        yield f"{method} {density}: mean, deviations of z from a normal's", _excess(float(z.square().mean()) - 1, z)
        ratio = drawn.var(0).sum() / variance.sum()
        yield f"{method} {density}: variance / expected − 1, beyond 5 %", max(0.0, abs(float(ratio) - 1) - 0.05)
        values = (drawn.abs() < 1e-12) | ((drawn - change / p).abs() < 1e-9)
        yield f"{method} {density}: elements neither 0 nor δ/p", float((~values).sum())
    for method in ("dare", "dare-ties", "della"):
        options = {"method": method, "density": 0.5, "seed": 5}
        one = merged_by_us(base, [adapter], folder / "out", workers=1, **options)
        two = merged_by_us(base, [adapter], folder / "out", workers=4, max_memory="16MiB", **options)
        yield (
            f"{method}: tensors that workers and memory change",
            float(sum(bool((one[k] != two[k]).any()) for k in one)),
        )


def _excess(distance_of_variance: float, z: torch.Tensor) -> float:
    """Return how far the mean square of z lies from 1 beyond five standard errors."""
    return max(0.0, abs(distance_of_variance) - 5 * (2 / z.numel()) ** 0.5)


MERGEKIT = """
import sys, torch
from mergekit.sparsify import della_magprune, RescaleNorm
x, total = torch.load(sys.argv[1]), 0
torch.manual_seed(0)
kept = [della_magprune(x, float(sys.argv[2]), float(sys.argv[3]), rescale_norm=None) != 0 for _ in range(int(sys.argv[4]))]
torch.save(torch.stack(kept).double().mean(0), sys.argv[5])
"""


def mergekit(python: str, folder: Path) -> Iterator[tuple[str, float]]:
    """Compare DELLA's probabilities with the shares that mergekit keeps; its epsilon is ours."""
    from dora_convert.maths.combine import probabilities, spread_of

    torch.manual_seed(1)
    x, count = torch.randn(12, 40).double(), 4000
    torch.save(x, folder / "x.pt")
    for density in (0.3, 0.6):
        spread = spread_of(density)
        words = [folder / "x.pt", density, spread, count, folder / "kept.pt"]
        subprocess.run([python, "-c", MERGEKIT, *map(str, words)], check=True)
        p = probabilities(x, density)
        z = (torch.load(folder / "kept.pt") - p) / (p * (1 - p) / count).sqrt()
        yield f"mergekit's della {density}, ε {spread}: deviations beyond 5 σ", float((z.abs() > 5).sum())


def main() -> None:
    """Run all comparisons; exit with 1 if one is off."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        parts = [chains, methods, draws]
        runs = [part(Path(name) / part.__name__) for part in parts]
        if len(sys.argv) > 1:
            (Path(name) / "mergekit").mkdir()
            runs.append(mergekit(sys.argv[1], Path(name) / "mergekit"))
        for title, error in itertools.chain(*runs):
            sys.stdout.write(f"{error:10.2e}  {title}\n")
            sys.stdout.flush()
            worst = max(worst, error)
    sys.stdout.write(f"\nworst: {worst:.2e}, bound {MOST:.0e}\n")
    sys.exit(worst > MOST)


if __name__ == "__main__":
    main()
