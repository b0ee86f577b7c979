"""Read LoHa, LoKr, HiRA and VeRA: addends that are made of products of factors.

.hada_w1_a (out, r)  .hada_w1_b (r, in)  .hada_w2_a  .hada_w2_b       LoHa
.hada_t1 (r, r, *k), with .hada_w1_a (r, out); the same of 2          LoHa of a convolution
.lokr_w1 (a, b), or .lokr_w1_a (a, r)  .lokr_w1_b (r, b)              LoKr; the same of 2
.lokr_t2 (r, r, *k), with .lokr_w2_a (r, c)  .lokr_w2_b (r, d)        LoKr of a convolution
.hira_A (r, in)  .hira_B (out, r)                                     HiRA
.vera_lambda_b (out)  .vera_lambda_d (r)                              VeRA, with for all modules
base_model.vera_A (r, widest in)  base_model.vera_B (widest out, r)   unless save_projection is false
"""

from __future__ import annotations

from ....adapters import LowRank, Update
from ....adapters.kinds import Computed, Factor, Hadamard, Kronecker, Modulated, Tucker, shape_of
from ....storage.safetensors import StoredTensor
from ....storage.stored_view import view
from .kind import Fields, Kind, KindModule


def _loha(module: KindModule) -> Update | str:
    config = module.fields.config
    one, other = (_product(module, f"t{side}", f"a{side}", f"b{side}") for side in "12")
    if isinstance(one, str) or isinstance(other, str):
        return str(one if isinstance(one, str) else other)
    if (one.outputs, one.inputs) != (other.outputs, other.inputs):
        return "its two products have different shapes"
    if wrong := _wrong_rank(module, one.rank):
        return wrong
    return Hadamard(one, other, config.scaling(module.name))


def _product(module: KindModule, core: str, left: str, right: str) -> LowRank | Tucker | str:
    """Return the product of two parts, with a core between them if there is one."""
    B, A, t = module.parts.get(left), module.parts.get(right), module.parts.get(core)
    if not B or not A or len(A.shape) != 2 or len(B.shape) != 2:
        return "lacks a factor, or one is not a matrix"
    if t is None:
        return LowRank(A, B, 1.0) if A.shape[0] == B.shape[1] else _unequal(A, B)
    fits = len(t.shape) > 2 and t.shape[:2] == (B.shape[0], A.shape[0])
    return Tucker(t, A, view(B, turned=True)) if fits else f"its core {t.shape} does not fit {B.shape} and {A.shape}"


def _unequal(A: StoredTensor, B: StoredTensor) -> str:
    return f"{B.name} {B.shape} and {A.name} {A.shape} have different ranks"


def _wrong_rank(module: KindModule, rank: int) -> str:
    known = module.fields.config.rank(module.name)
    return "" if rank == known else f"the config says rank {known}; the factors have {rank}"


def _lokr(module: KindModule) -> Update | str:
    one, other = _kronecker_factor(module, "1"), _kronecker_factor(module, "2")
    for factor in (one, other):
        if isinstance(factor, str):
            return factor
        if isinstance(factor, LowRank | Tucker) and (wrong := _wrong_rank(module, factor.rank)):
            return wrong
    if isinstance(one, Tucker) or len(shape_of(one)) != 2:  # type: ignore[arg-type] # no str is left
        return "its first factor is not a matrix"
    return Kronecker(one, other, module.fields.config.scaling(module.name))  # type: ignore[arg-type]


def _kronecker_factor(module: KindModule, side: str) -> Factor | str:
    if whole := module.parts.get(f"w{side}"):
        return whole if len(whole.shape) > 1 else f"{whole.name} is not a matrix"
    return _product(module, f"t{side}", f"a{side}", f"b{side}")


def _hira(module: KindModule) -> Update | str:
    A, B = module.parts["A"], module.parts["B"]
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1]:
        return _unequal(A, B)
    return Modulated(LowRank(A, B, 1.0))


def _vera(module: KindModule) -> Update | str:
    b, d, fields = module.parts["b"], module.parts["d"], module.fields
    A, B = module.parts.get("A"), module.parts.get("B")
    if not A and not B and not fields.get("save_projection", bool, default=True):
        numbers = (("seed", fields.get("projection_prng_key", int, 0)), ("rank", d.numel))
        return Computed("VeRA", (("b", b), ("d", d)), numbers=numbers, shape=(b.numel, None), widest=True)
    if not A or not B:
        return "the file has no base_model.vera_A and vera_B, which save_projection promises"
    if not A.shape[0] == B.shape[1] == d.numel or B.shape[0] < b.numel:
        return f"vera_A {A.shape} and vera_B {B.shape} do not fit vera_lambda_d {d.shape} and vera_lambda_b {b.shape}"
    return LowRank(A, view(B, rows=range(b.numel)), 1.0, d=d, b=b, widest=True)


def _scaling(fields: Fields, module: str) -> str:
    return fields.config.rule(module)


KINDS = {
    "LOHA": Kind(
        "LoHa",
        {
            ".hada_w1_a": "a1",
            ".hada_w1_b": "b1",
            ".hada_w2_a": "a2",
            ".hada_w2_b": "b2",
            ".hada_t1": "t1",
            ".hada_t2": "t2",
        },
        ("a1", "b1", "a2", "b2"),
        _loha,
        fields=("r", "alpha", "use_effective_conv2d"),
        rule=_scaling,
    ),
    "LOKR": Kind(
        "LoKr",
        {
            ".lokr_w1": "w1",
            ".lokr_w1_a": "a1",
            ".lokr_w1_b": "b1",
            ".lokr_w2": "w2",
            ".lokr_w2_a": "a2",
            ".lokr_w2_b": "b2",
            ".lokr_t2": "t2",
        },
        (),
        _lokr,
        fields=("r", "alpha", "use_effective_conv2d", "decompose_both", "decompose_factor"),
        rule=_scaling,
    ),
    "HIRA": Kind("HiRA", {".hira_A": "A", ".hira_B": "B"}, ("A", "B"), _hira, fields=("r", "hira_dropout")),
    "VERA": Kind(
        "VeRA",
        {".vera_lambda_b": "b", ".vera_lambda_d": "d"},
        ("b", "d"),
        _vera,
        fields=("r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"),
        shared={"base_model.vera_A": "A", "base_model.vera_B": "B"},
    ),
}
