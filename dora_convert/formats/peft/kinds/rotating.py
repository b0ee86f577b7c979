"""Read OFT, BOFT and HRA, which rotate the inputs of a weight, and (IA)³, which scales inputs or outputs.

.oft_R.weight (blocks, b(b−1)/2)   OFT: the elements above the diagonals of skew blocks; one if block_share
.boft_R (stages, blocks, b, b)     BOFT, with
.boft_s (out, 1)                   a factor for each output
.hra_u (in, r)                     HRA
.ia3_l (out, 1) or (1, in)         (IA)³; a convolution's is (1, n, 1, 1), and feedforward_modules tells which
"""

from __future__ import annotations

import re
from typing import Any

from ....adapters import Decomposed, Update
from ....adapters.rotations import Rotated
from .kind import Kind, KindModule

_TERMS = 5


def _oft(module: KindModule) -> Update | str:
    upper, fields = module.parts["R"], module.fields
    size = (1 + (1 + 8 * upper.shape[-1]) ** 0.5) / 2
    if len(upper.shape) != 2 or size != int(size):
        return f"its blocks {upper.shape} are not above the diagonals of square blocks"
    series = fields.get("use_cayley_neumann", bool, default=True)
    return Rotated(
        upper,
        "oft",
        terms=fields.get("num_cayley_neumann_terms", int, _TERMS) if series else 0,
        limit=fields.get("eps", float, 6e-5) if fields.get("coft", bool, default=False) else 0.0,
        embedding=".oft_embedding_R" in upper.name,
        shared=fields.get("block_share", bool, default=False),
    )


def _boft(module: KindModule) -> Update | str:
    blocks, scales = module.parts["R"], module.parts["s"]
    if len(blocks.shape) != 4 or blocks.shape[2] != blocks.shape[3]:
        return f"its blocks have shape {blocks.shape}, not (stages, blocks, b, b)"
    return Decomposed(Rotated(blocks, "boft"), scales, normalised=True)


def _hra(module: KindModule) -> Update | str:
    u = module.parts["u"]
    if len(u.shape) != 2:
        return f"its vectors have shape {u.shape}, not (in, r)"
    return Rotated(u, "hra", terms=int(module.fields.get("apply_GS", bool, default=False)))


def _ia3(module: KindModule) -> Update | str:
    scales, fields = module.parts["l"], module.fields
    if len(scales.shape) == 2 and scales.shape[0] != scales.shape[1]:
        by_inputs = scales.shape[0] == 1
    else:
        by_inputs = _is_feedforward(module.name, fields.raw.get("feedforward_modules"))
    return Decomposed(None, scales, axis="columns" if by_inputs else "rows", normalised=True)


def _is_feedforward(module: str, names: Any) -> bool:
    """Return True if a module is among `feedforward_modules`: a regex, or ends of names without a dot, as in PEFT."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return isinstance(names, list) and any(isinstance(name, str) and module.endswith(name) for name in names)


KINDS = {
    "OFT": Kind(
        "OFT",
        {".oft_R.weight": "R", ".oft_embedding_R.weight": "R"},
        ("R",),
        _oft,
        fields=frozenset(
            {"r", "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"}
        ),
    ),
    "BOFT": Kind(
        "BOFT",
        {".boft_R": "R", ".boft_s": "s"},
        ("R", "s"),
        _boft,
        fields=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"),
    ),
    "HRA": Kind("HRA", {".hra_u": "u"}, ("u",), _hra, fields=("r", "apply_GS")),
    "IA3": Kind(
        "(IA)³", {".ia3_l": "l"}, ("l",), _ia3, fields=("feedforward_modules", "init_ia3_weights"), scales_bias=True
    ),
}
