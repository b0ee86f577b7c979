"""Read kohya's LoRA files, and those of LyCORIS and OneTrainer, which use the same names.

A module is `lora_unet_`, `lora_te_`, `lora_te1_`, `lora_transformer_`, `lycoris_`, … and its name with underscores for
dots. Other programs write the same ends behind dotted names. The ends, for a weight of (out, in, k…):

    .lora_down.weight (r, in, k…)  .lora_up.weight (out, r, 1…)  .alpha ()     LoRA, LoCon: s = alpha/r, 1 without alpha
    .lora_mid.weight  (r, r, k…)                                               LoCon with a core
    .hada_w1_a (out, r)  .hada_w1_b (r, in)  .hada_w2_a  .hada_w2_b            LoHa; with hada_t1, hada_t2 (r, r, k…)
    .lokr_w1 | .lokr_w1_a .lokr_w1_b   .lokr_w2 | .lokr_w2_a .lokr_w2_b        LoKr; with lokr_t2 (r, r, k…)
    .diff  .diff_b   .w_norm  .b_norm                                          differences, added to weights and norms
    .oft_blocks (n, b, b) or (m, n, b, b)   .rescale (out, 1…)                 diag-OFT and BOFT, on the outputs
    .weight  .on_input                                                         LyCORIS' (IA)³: W·(1 + weight)
    .magnitude (out)                                                           ai-toolkit's DoRA; it stores no alpha
    .dora_scale  (out, 1…) by rows, (1, in, 1…) by columns                     DoRA

rsLoRA is in alpha already. A constrained diag-OFT has alpha·out as its limit. The header's metadata is optional.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from ...adapters import NOTHING, Adapter, Change, Decomposed, Delta, LowRank, Transform, Update, Waived
from ...adapters.facts import ScalingOrOne, scaled_outside
from ...adapters.parts import Findings, Parts, flat, read_number, sort_parts, turned, wrong_parts
from ...settings import AdapterFacts
from ...storage.file_view import FileView
from ...storage.refs import Source
from ...storage.safetensors import StoredTensor

if TYPE_CHECKING:
    from ...adapters.kinds import Tucker
    from ...adapters.new_adapter import Writer

NAME = "kohya"
LIBRARY = "diffusers"
TAKES = ("axis", "alpha", "scaling")

ENDS: Mapping[str, str] = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid", ".alpha": "alpha",
    ".dora_scale": "m", ".hada_w1_a": "w1a", ".hada_w1_b": "w1b", ".hada_w2_a": "w2a", ".hada_w2_b": "w2b",
    ".hada_t1": "t1", ".hada_t2": "t2", ".lokr_w1": "w1", ".lokr_w1_a": "w1a'", ".lokr_w1_b": "w1b'",
    ".lokr_w2": "w2", ".lokr_w2_a": "w2a'", ".lokr_w2_b": "w2b'", ".lokr_t2": "t2'", ".diff": "diff",
    ".diff_b": "diff_b", ".w_norm": "w_norm", ".b_norm": "b_norm", ".oft_blocks": "oft", ".rescale": "rescale",
    ".on_input": "on_input", ".a1.weight": "a1", ".a2.weight": "a2", ".b1.weight": "b1", ".b2.weight": "b2",
    ".magnitude": "magnitude", ".q_layer.weight": "q_layer", ".p_layer.weight": "p_layer", ".lambda_layer": "lambda",
}  # fmt: skip
"""A part of a module's update, by the end of a tensor's name."""
Scaled = Callable[[Parts, int], tuple[float, str]]
"""Gives s of a module's parts and a rank, and its rule."""
_OF_LYCORIS = re.compile(r"\.(hada_|lokr_|dora_scale|oft_blocks|w_norm|b_norm|on_input)|^lycoris_")
_MARKS = re.compile(r"\.(lora_down\.weight|hada_w1_a|lokr_w[12]\w*|oft_blocks|diff|w_norm|b1\.weight|on_input)$")
_PREFIX = re.compile(r"(lora|lycoris)_[a-z0-9_]*?[^.]*$")
REFUSED = {"a1": "GLoRA", "a2": "GLoRA", "b1": "GLoRA", "b2": "GLoRA", "q_layer": "T-LoRA", "p_layer": "T-LoRA"}
"""Methods that are known and not merged, by their parts."""


def recognises(view: FileView) -> bool:
    """Return True for a file with kohya's ends of names."""
    return view.find(_is_kohya) is not None


def _is_kohya(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(_MARKS.search(name) for name in tensors)


def read(source: Source, waived: Waived = NOTHING) -> Adapter:
    """Read a file's header and its alphas; RefError if a folder has several such files."""
    view = FileView.of(source.path)
    file = view.only(_is_kohya, source.name)
    header = view.need(file)
    modules, rest = sort_parts(header.tensors, ENDS)
    findings, otherwise = Findings(), ScalingOrOne(waived.facts)
    for module, parts in modules.items():
        if weight := rest.pop(f"{module}.weight", None) if "on_input" in parts else None:
            parts["ia3"] = weight
        _read_module(module, parts, findings, partial(_scaling, otherwise), waived.facts)
    otherwise.refuse_needless()
    findings.fault(rest.values(), "is not part of a LoRA of kohya's form")
    kinds = {change.update.title.partition(",")[0] for change in findings.changes}
    flattened = all(_PREFIX.match(module) for module in modules)
    return findings.adapter(
        view,
        [file],
        source,
        format=NAME,
        kind=" and ".join(sorted(kinds)) or "LoRA",
        maker=_maker(header.metadata, header.tensors),
        base=header.metadata.get("ss_sd_model_name"),
        warnings=otherwise.warnings(source),
        naming="flattened" if flattened else "components",
    )


def _maker(metadata: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> str | None:
    """Return the program that wrote a file."""
    if any(name.startswith("ot_") for name in metadata):
        return "OneTrainer"
    if "lycoris" in metadata.get("ss_network_module", "") or any(map(_OF_LYCORIS.search, tensors)):
        return "LyCORIS"
    return None


def _read_module(module: str, parts: Parts, findings: Findings, scaling: Scaled, facts: AdapterFacts) -> None:
    """Turn the parts of one module into changes, or a fault."""
    if known := next((REFUSED[part] for part in parts if part in REFUSED), None):
        findings.fault(parts.values(), f"is of {known}, which is not merged yet")
    elif why := wrong_parts(parts, _needed(parts), ENDS):
        findings.fault(parts.values(), why)
    else:
        used = {"alpha"}
        for leaf, update, rule, names in _updates(parts, scaling, facts):
            if "magnitude" in names and isinstance(update, LowRank):
                findings.changes += scaled_outside(f"{module}.{leaf}", update, parts["magnitude"], rule)
            else:
                findings.changes.append(Change(f"{module}.{leaf}", update, rule=rule))
            used |= names
        if alpha := parts.get("alpha"):
            findings.ignored[alpha.name] = "read into the scaling"
        if flag := parts.get("on_input"):
            findings.ignored[flag.name] = "read: it says which side is scaled"
            used.add("on_input")
        findings.fault((parts[part] for part in parts if part not in used), "has no part beside it that uses it")


def _needed(parts: Parts) -> set[str]:
    """Return the parts that must be there beside those that are."""
    groups = ({"down", "up"}, {"w1a", "w1b", "w2a", "w2b"}, {"w1a'", "w1b'"}, {"w2a'", "w2b'"})
    needed = {part for group in groups if group & parts.keys() for part in group}
    lokr = {"w1", "w2", "w1a'", "w2a'"} & parts.keys()
    needed |= {"w1"} if lokr and "w1a'" not in parts else set()
    needed |= {"w2"} if lokr and "w2a'" not in parts else set()
    return needed | ({"down", "up"} if "mid" in parts else set())


def _updates(parts: Parts, scaling: Scaled, facts: AdapterFacts) -> list[tuple[str, Update, str, set[str]]]:
    """Return a module's updates: the end of the target, the update, its rule, and the parts that it uses."""
    found: list[tuple[str, Update, str, set[str]]] = []
    transform, rule, used = _transform(parts, scaling)
    if scale := parts.get("m") or parts.get("rescale") or parts.get("ia3"):
        update = _decomposed(scale, transform, parts, facts)
        found.append(("weight", update, rule, used | {"m", "rescale", "ia3"}))
    elif transform:
        used = used | {"magnitude"} if isinstance(transform, LowRank) and "magnitude" in parts else used
        found.append(("weight", transform, rule, used))
    for part, leaf in (("w_norm", "weight"), ("diff_b", "bias"), ("b_norm", "bias")):
        if part in parts:
            found.append((leaf, Delta(parts[part], 1.0), "added as it is", {part}))
    return found


def _transform(parts: Parts, scaling: Scaled) -> tuple[Transform | None, str, set[str]]:
    """Return what a module adds to W or turns W by, the rule of its scaling, and the parts that it uses."""
    if "down" in parts:
        return _locon(parts, scaling)
    if "w1a" in parts:
        return _loha(parts, scaling)
    if {"w1", "w2", "w1a'", "w2a'"} & parts.keys():
        return _lokr(parts, scaling)
    if "diff" in parts:
        from ...adapters.kinds import Dense

        return Dense(parts["diff"], 1.0, transposed=False), "added as it is", {"diff"}
    if "oft" in parts:
        from ...adapters.rotations import Rotated

        blocks = parts["oft"]
        rule = "diag-oft" if len(blocks.shape) == 3 else "butterfly"
        limit = read_number(parts["alpha"]) if "alpha" in parts else 0.0
        outputs = blocks.shape[-3] * blocks.shape[-1]
        return Rotated(blocks, rule, limit=max(0.0, limit) * outputs), "", {"oft"}
    return None, "", set()


def _scaling(otherwise: ScalingOrOne, parts: Parts, rank: int) -> tuple[float, str]:
    """Return s = alpha/r and its rule; 1 without alpha, or if alpha is 0; ai-toolkit's alpha is the caller's."""
    alpha = read_number(parts["alpha"]) if "alpha" in parts else 0.0
    if not alpha and "magnitude" in parts:
        return otherwise.of(rank)
    return (alpha / rank, f"alpha {alpha:g} / rank {rank}") if alpha else (1.0, "no alpha: 1")


def _locon(parts: Parts, scaling: Scaled) -> tuple[Transform, str, set[str]]:
    """Return a LoRA or LoCon: up·down, with a core between them if there is one."""
    down, up = parts["down"], parts["up"]
    scale, rule = scaling(parts, down.shape[0])
    if "mid" in parts:
        from ...adapters.kinds import Tucker

        return Tucker(parts["mid"], flat(down), flat(up), scale), rule, {"down", "up", "mid"}
    if len(flat(down).shape) == 2:
        down, up = flat(down), flat(up)
    return LowRank(down, up, scale, transposed=False), rule, {"down", "up"}


def _loha(parts: Parts, scaling: Scaled) -> tuple[Transform, str, set[str]]:
    """Return a LoHa: the elementwise product of two products of factors."""
    from ...adapters.kinds import Hadamard

    one, other = (_product(parts, f"{w}a", f"{w}b", f"t{w[1]}") for w in ("w1", "w2"))
    scale, rule = scaling(parts, parts["w1b"].shape[0])
    return Hadamard(one, other, scale, transposed=False), rule, {"w1a", "w1b", "w2a", "w2b", "t1", "t2"}


def _lokr(parts: Parts, scaling: Scaled) -> tuple[Transform, str, set[str]]:
    """Return a LoKr: a Kronecker product, each of whose sides is whole or a product of factors."""
    from ...adapters.kinds import Kronecker

    one = parts["w1"] if "w1" in parts else LowRank(parts["w1b'"], parts["w1a'"], 1.0, transposed=False)
    other = parts["w2"] if "w2" in parts else _product(parts, "w2a'", "w2b'", "t2'")
    ranked = parts.get("w2b'") or parts.get("w1b'")
    scale, rule = scaling(parts, ranked.shape[0]) if ranked else (1.0, "both sides are whole: 1")
    used = {"w1", "w2", "w1a'", "w1b'", "w2a'", "w2b'", "t2'"}
    return Kronecker(one, other, scale, transposed=False), rule, used


def _product(parts: Parts, left: str, right: str, core: str) -> LowRank | Tucker:
    """Return the product of two factors; with a core both are (r, …), and the left one is turned."""
    if core not in parts:
        return LowRank(parts[right], parts[left], 1.0, transposed=False)
    from ...adapters.kinds import Tucker

    return Tucker(parts[core], parts[right], turned(parts[left]), 1.0)


def _decomposed(m: StoredTensor, transform: Transform | None, parts: Parts, facts: AdapterFacts) -> Update:
    """Return the update that sets magnitudes, or multiplies by them."""
    if "ia3" in parts:
        on_input = bool(read_number(parts["on_input"]))
        return Decomposed(None, m, axis="columns" if on_input else "rows", normalised=True, offset=1.0)
    if "m" not in parts:
        return Decomposed(transform, m, normalised=True)
    update = Decomposed(transform, m)
    outputs, inputs = (transform.outputs, (transform.inputs or (0,))[0]) if transform else (None, 0)
    along = axis_of(m.shape, outputs, inputs)
    if along is None and facts.axis is None:
        from ...adapters.kinds import Undecided

        return Undecided((update, replace(update, axis="columns")), "its norms may be by rows or by columns")
    return replace(update, axis=along or str(facts.axis))


def axis_of(shape: tuple[int, ...], outputs: int | None, inputs: int) -> str | None:
    """Return the side along which the magnitudes of a `dora_scale` lie; None if its shape does not tell."""
    if len(shape) > 1:
        return "columns" if shape[0] == 1 and (shape[1] == inputs or outputs != 1) else "rows"
    if outputs == inputs:
        return None
    return "columns" if shape[0] == inputs else "rows"


def writer() -> Writer:
    """Return what writes the format. A merge never imports it."""
    from . import write

    return cast("Writer", write)
