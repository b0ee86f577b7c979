"""Read SHiRA, and the kinds whose addend is computed whole: MiSS, DeLoRA, FourierFT, C3A and RandLoRA.

.shira_weight (n)  .shira_indices (2, n)                    SHiRA
.miss_block (r, out); (r, mini_r) with init_weights "mini"  MiSS
.delora_A (r, in)  .delora_B (out, r)  .delora_lambda (1)   DeLoRA, with
.delora_w_norm (in)                                         the norms of W's columns before training
.fourierft_spectrum (n)                                     FourierFT; the config has seed and scaling
.c3a_kernel (out/b, in/b, b)                                C3A
.randlora_lambda (r, n)  .randlora_gamma (n, smaller side)  RandLoRA, with in each module
.randlora_A (r, 1, …)  .randlora_B (…, n, r)                the same bases, unless save_projection is false
"""

from __future__ import annotations

from ....adapters import Update
from ....adapters.kinds import Computed, Sparse
from .kind import Fields, Kind, KindModule


def _shira(module: KindModule) -> Update | str:
    values, index = module.parts["values"], module.parts["index"]
    if index.shape != (2, values.numel):
        return f"{values.numel} elements have places {index.shape}"
    return Sparse(values, index)


def _miss(module: KindModule) -> Update | str:
    block = module.parts["block"]
    if len(block.shape) != 2:
        return f"its block has shape {block.shape}, not (r, out)"
    mini = module.fields.raw.get("init_weights") == "mini"
    return Computed("MiSS", (("block", block),), shape=(None if mini else block.shape[1], None))


def _refuse_bat(fields: Fields) -> str | None:
    if fields.raw.get("init_weights") == "bat":
        return 'MiSS with init_weights "bat" multiplies the weight, too: this version does not merge it'
    return None


def _delora(module: KindModule) -> Update | str:
    A, B = module.parts["A"], module.parts["B"]
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1] or module.parts["norms"].numel != A.shape[1]:
        return f"delora_A {A.shape}, delora_B {B.shape} and delora_w_norm do not fit each other"
    return Computed("DeLoRA", tuple(module.parts.items()), shape=(B.shape[0], A.shape[1]))


def _fourier(module: KindModule) -> Update | str:
    numbers = (("seed", module.fields.get("random_loc_seed", int, 777)),)
    scale = module.fields.get("scaling", float, 150.0)
    return Computed("FourierFT", (("spectrum", module.parts["spectrum"]),), scale, numbers)


def _c3a(module: KindModule) -> Update | str:
    kernel = module.parts["kernel"]
    if len(kernel.shape) != 3:
        return f"its kernel has shape {kernel.shape}, not (out/b, in/b, b)"
    m, n, b = kernel.shape
    return Computed("C3A", (("kernel", kernel),), shape=(m * b, n * b))


def _randlora(module: KindModule) -> Update | str:
    parts = module.parts
    if "A" not in parts or "B" not in parts:
        return "the random bases were not saved (save_projection is false): this version does not make them again"
    weights, scales = parts["weights"], parts["scales"]
    if len(weights.shape) != 2 or len(scales.shape) != 2 or weights.shape[1] != scales.shape[0]:
        return f"randlora_lambda {weights.shape} and randlora_gamma {scales.shape} do not fit each other"
    scale = module.fields.get("randlora_alpha", float, 640.0) / weights.shape[0]
    return Computed("RandLoRA", tuple(parts.items()), scale)


KINDS = {
    "SHIRA": Kind(
        "SHiRA",
        {".shira_weight": "values", ".shira_indices": "index"},
        ("values", "index"),
        _shira,
        fields=("r", "mask_type", "random_seed"),
    ),
    "MISS": Kind(
        "MiSS", {".miss_block": "block"}, ("block",), _miss, fields=("r", "miss_dropout", "mini_r"), refuse=_refuse_bat
    ),
    "DELORA": Kind(
        "DeLoRA",
        {".delora_A": "A", ".delora_B": "B", ".delora_lambda": "strength", ".delora_w_norm": "norms"},
        ("A", "B", "strength", "norms"),
        _delora,
        fields=("r", "delora_lambda", "lambda_pattern"),
    ),
    "FOURIERFT": Kind(
        "FourierFT",
        {".fourierft_spectrum": "spectrum"},
        ("spectrum",),
        _fourier,
        fields=("n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern"),
    ),
    "C3A": Kind("C3A", {".c3a_kernel": "kernel"}, ("kernel",), _c3a, fields=("block_size", "block_size_pattern")),
    "RANDLORA": Kind(
        "RandLoRA",
        {".randlora_lambda": "weights", ".randlora_gamma": "scales", ".randlora_A": "A", ".randlora_B": "B"},
        ("weights", "scales"),
        _randlora,
        fields=frozenset(
            {
                "r",
                "randlora_alpha",
                "randlora_dropout",
                "projection_prng_key",
                "save_projection",
                "sparse",
                "very_sparse",
            }
        ),
        shared={"base_model.randlora_A": "A", "base_model.randlora_B": "B"},
    ),
}
