"""Read PEFT's adapters of other methods than LoRA: their tensors, and the fields of the config that count.

Names are `base_model.model.<module>` and an end. Each method's entry in `METHODS` names its ends, its fields, and the
function that makes an update of a module's tensors. Shapes are those of a weight of (out, in):

    LOHA       hada_w1_a (out, r)  hada_w1_b (r, in)  hada_w2_a  hada_w2_b; of convolutions also hada_t1, hada_t2
    LOKR       lokr_w1 | lokr_w1_a lokr_w1_b   lokr_w2 | lokr_w2_a lokr_w2_b; of convolutions also lokr_t2
    OFT        oft_R.weight (in/b, b(b−1)/2)                     BOFT       boft_R (m, n, b, b)  boft_s (out, 1)
    IA3        ia3_l (out, 1), or (1, in) in feedforward_modules HRA        hra_u (in, r)
    VERA       vera_lambda_b (out)  vera_lambda_d (r); vera_A (r, widest in) and vera_B (widest out, r) serve all
    SHIRA      shira_weight (n)  shira_indices (2, n)            HIRA       hira_A (r, in)  hira_B (out, r)
    MISS       miss_block (r, out)                               DELORA     delora_A  delora_B  lambda  w_norm
    FOURIERFT  fourierft_spectrum (n)                            C3A        c3a_kernel (out/b, in/b, b)
    RANDLORA   randlora_lambda (r, n)  randlora_gamma (n, r); randlora_A and randlora_B serve all
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from ...adapters import Adapter, Change, Decomposed, Full, LowRank, Update, Waived
from ...adapters.kinds import Computed, Follows, Hadamard, Kronecker, Modulated, Sparse, Tucker
from ...adapters.parts import Findings, Parts, sort_parts, turned, weight_of, wrong_parts
from ...adapters.rotations import Rotated
from ...errors import Fault, UnsupportedError
from ...storage.checkpoint import Checkpoint, read_weights
from ...storage.refs import Source
from ...storage.safetensors import StoredTensor
from ...storage.stored_view import view
from .modules import CONFIG, plain
from .patterns import PatternTable

COMMON = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "fan_in_fan_out", "init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale", "runtime_config",
    "use_effective_conv2d",
}  # fmt: skip
"""Fields of all methods that say nothing about a merge, or that the tensors say already."""


@dataclass(frozen=True)
class MethodConfig:
    """The config of one method, field by field."""

    raw: Mapping[str, Any]

    def number(self, name: str, default: float) -> float:
        """Return a number of the config."""
        value = self.raw.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default

    def scaling(self, module: str, rank: int, field: str = "alpha") -> tuple[float, str]:
        """Return alpha/r of a module and its rule; patterns may change both."""
        alpha = self._pattern("alpha_pattern", module, self.number(field, 8))
        r = self._pattern("rank_pattern", module, self.number("r", rank))
        return alpha / r, f"{field} {alpha:g} / rank {r:g}"

    def _pattern(self, field: str, module: str, default: float) -> float:
        table = self.raw.get(field)
        if not isinstance(table, dict) or not table:
            return default
        return float(PatternTable(table).find(module, default)[0])


Shared = Mapping[str, StoredTensor]
"""Tensors that serve all modules, by their last names."""


class Method(NamedTuple):
    """One method: the parts of a module by the ends of names, the needed ones, its own fields, and its reader."""

    title: str
    ends: Mapping[str, str]
    needed: Collection[str]
    fields: Collection[str]
    read: Callable[[str, Parts, MethodConfig, Shared], tuple[Update, str]]


def _loha(module: str, parts: Parts, config: MethodConfig, _: Shared) -> tuple[Update, str]:
    one, other = (_product(parts, f"{w}a", f"{w}b", f"t{w[1]}") for w in ("w1", "w2"))
    scale, rule = config.scaling(module, parts["w1b"].shape[0])
    return Hadamard(one, other, scale, transposed=None), rule


def _lokr(module: str, parts: Parts, config: MethodConfig, _: Shared) -> tuple[Update, str]:
    one = parts["w1"] if "w1" in parts else LowRank(parts["w1b"], parts["w1a"], 1.0, transposed=False)
    other = parts["w2"] if "w2" in parts else _product(parts, "w2a", "w2b", "t2")
    ranked = parts.get("w2b") or parts.get("w1b")
    scale, rule = config.scaling(module, ranked.shape[0] if ranked else 8)
    return Kronecker(one, other, scale, transposed=None), rule


def _product(parts: Parts, left: str, right: str, core: str) -> LowRank | Tucker:
    """Return the product of two factors; with a core both are (r, …), and the left one is turned."""
    if core not in parts:
        return LowRank(parts[right], parts[left], 1.0, transposed=False)
    return Tucker(parts[core], parts[right], turned(parts[left]), 1.0)


def _oft(_: str, parts: Parts, config: MethodConfig, __: Shared) -> tuple[Update, str]:
    terms = int(config.number("num_cayley_neumann_terms", 5)) if config.raw.get("use_cayley_neumann", True) else 0
    limit = config.number("eps", 6e-5) if config.raw.get("coft") else 0.0
    shared = bool(config.raw.get("block_share"))
    rule = f"Cayley–Neumann, {terms} terms" if terms else "Cayley"
    return Rotated(parts["R"], "oft", terms=terms, limit=limit, shared=shared), rule


def _boft(_: str, parts: Parts, __: MethodConfig, ___: Shared) -> tuple[Update, str]:
    return Decomposed(Rotated(parts["R"], "boft"), parts["s"], normalised=True), "Cayley"


def _hra(_: str, parts: Parts, config: MethodConfig, __: Shared) -> tuple[Update, str]:
    return Rotated(parts["u"], "hra", terms=int(bool(config.raw.get("apply_GS")))), "reflections"


def _ia3(module: str, parts: Parts, config: MethodConfig, _: Shared) -> tuple[Update, str]:
    wide = config.raw.get("feedforward_modules") or ()
    ends = (wide,) if isinstance(wide, str) else tuple(wide)
    on_input = any(f".{module}".endswith(f".{end}") for end in ends)
    return Decomposed(None, parts["l"], axis="columns" if on_input else "rows", normalised=True), "multiplied"


def _vera(_: str, parts: Parts, __: MethodConfig, shared: Shared) -> tuple[Update, str]:
    if "vera_A" not in shared or "vera_B" not in shared:
        raise UnsupportedError(
            "The shared matrices of this VeRA are not in its file (save_projection=False): not merged yet.",
            hint="load it with PEFT, and save it with save_projection=True",
        )
    rows = range(parts["b"].numel)
    low = LowRank(shared["vera_A"], view(shared["vera_B"], rows=rows), 1.0, d=parts["d"], b=parts["b"])
    return low, "1"


def _shira(_: str, parts: Parts, __: MethodConfig, ___: Shared) -> tuple[Update, str]:
    return Sparse(parts["values"], parts["index"]), "1"


def _hira(_: str, parts: Parts, __: MethodConfig, ___: Shared) -> tuple[Update, str]:
    return Modulated(LowRank(parts["A"], parts["B"], 1.0)), "1"


def _computed(rule: str, module: str, parts: Parts, config: MethodConfig, shared: Shared) -> tuple[Update, str]:
    """Return an update that a rule computes of its parts."""
    scale, text = 1.0, "1"
    numbers: tuple[tuple[str, float], ...] = ()
    if rule == "FourierFT":
        scale = config.number("scaling", 150.0)
        text, numbers = f"scaling {scale:g}", (("seed", config.number("random_loc_seed", 777)),)
    if rule == "MiSS" and config.raw.get("init_weights") in ("bat", "mini"):
        raise UnsupportedError(f"MiSS with init_weights={config.raw['init_weights']!r} is not merged yet.")
    if rule == "RandLoRA":
        if not {"randlora_A", "randlora_B"} <= shared.keys():
            raise UnsupportedError("The shared bases of this RandLoRA are not in its file (save_projection=False).")
        parts = {**parts, "A": shared["randlora_A"], "B": shared["randlora_B"]}
        scale, text = config.scaling(module, int(config.number("r", 32)), "randlora_alpha")
    shape: tuple[int | None, int | None] = (None, None)
    if rule == "DeLoRA":
        shape = (parts["B"].shape[0], parts["A"].shape[1])
    elif rule == "C3A":
        m, n, b = parts["kernel"].shape
        shape = (m * b, n * b)
    return Computed(rule, tuple(parts.items()), scale, numbers, shape), text


_LOKR = {f".lokr_{name}": name.replace("_", "") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
_LOHA = {f".hada_{name}": name.replace("_", "") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
_RANKED = ("r", "alpha", "rank_pattern", "alpha_pattern")
METHODS: Mapping[str, Method] = {
    "LOHA": Method("LoHa", _LOHA, {"w1a", "w1b", "w2a", "w2b"}, _RANKED, _loha),
    "LOKR": Method("LoKr", _LOKR, (), (*_RANKED, "decompose_both", "decompose_factor"), _lokr),
    "OFT": Method("OFT", {".oft_R.weight": "R", ".oft_R": "R"}, {"R"},
                  ("r", "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann",
                   "num_cayley_neumann_terms"), _oft),
    "BOFT": Method("BOFT", {".boft_R": "R", ".boft_s": "s"}, {"R", "s"},
                   ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"), _boft),
    "HRA": Method("HRA", {".hra_u": "u"}, {"u"}, ("r", "apply_GS"), _hra),
    "IA3": Method("(IA)³", {".ia3_l": "l"}, {"l"}, ("feedforward_modules", "init_ia3_weights"), _ia3),
    "VERA": Method("VeRA", {".vera_lambda_b": "b", ".vera_lambda_d": "d"}, {"b", "d"},
                   ("r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"), _vera),
    "SHIRA": Method("SHiRA", {".shira_weight": "values", ".shira_indices": "index"}, {"values", "index"},
                    ("r", "mask_type", "random_seed"), _shira),
    "HIRA": Method("HiRA", {".hira_A": "A", ".hira_B": "B"}, {"A", "B"},
                   ("r", "hira_dropout", "rank_pattern"), _hira),
    "MISS": Method("MiSS", {".miss_block": "block"}, {"block"}, ("r", "miss_dropout", "mini_r"),
                   partial(_computed, "MiSS")),
    "DELORA": Method("DeLoRA", {".delora_A": "A", ".delora_B": "B", ".delora_lambda": "strength",
                                ".delora_w_norm": "norms"}, {"A", "B", "strength", "norms"},
                     ("r", "delora_lambda", "rank_pattern", "lambda_pattern"), partial(_computed, "DeLoRA")),
    "FOURIERFT": Method("FourierFT", {".fourierft_spectrum": "spectrum"}, {"spectrum"},
                        ("n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern"),
                        partial(_computed, "FourierFT")),
    "C3A": Method("C3A", {".c3a_kernel": "kernel"}, {"kernel"}, ("block_size", "block_size_pattern"),
                  partial(_computed, "C3A")),
    "RANDLORA": Method("RandLoRA", {".randlora_lambda": "weights", ".randlora_gamma": "scales"},
                       {"weights", "scales"},
                       ("r", "randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse",
                        "randlora_dropout"), partial(_computed, "RandLoRA")),
}  # fmt: skip
SHARED = ("vera_A", "vera_B", "randlora_A", "randlora_B")


def read_method(source: Source, raw: Mapping[str, Any], weights: str, waived: Waived) -> Adapter:
    """Read an adapter of one of these methods; UnsupportedError for fields that are not known."""
    method, config = METHODS[str(raw["peft_type"]).upper()], MethodConfig(raw)
    _refuse_fields(raw, method, source, waived.fields)
    path = source.path / weights
    tensors = {plain(name): tensor for name, tensor in read_weights(path).tensors.items()}
    modules, rest = sort_parts(tensors, method.ends)
    shared = {name.rpartition(".")[2]: rest.pop(name) for name in list(rest) if name.rpartition(".")[2] in SHARED}
    shared = {name.removeprefix("base_model."): tensor for name, tensor in shared.items()}
    findings = Findings()
    for module, parts in modules.items():
        if why := wrong_parts(parts, method.needed, method.ends, integers={"index"}):
            findings.fault(parts.values(), why)
        else:
            update, rule = method.read(module, parts, config, shared)
            findings.changes.append(Change(f"{module}.weight", update, rule=rule))
    _read_rest(rest, raw, findings)
    base, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    return Adapter(
        source=source,
        format="peft",
        kind=method.title,
        changes=tuple(findings.changes),
        tensors=read_weights(path).tensors,
        files=(source.path / CONFIG, path),
        base=base if isinstance(base, str) and base else None,
        revision=revision if isinstance(revision, str) and revision else None,
        faults=tuple(findings.faults),
        fit=_fit if method.title in ("VeRA", "(IA)³") else None,
    )


def _read_rest(rest: Mapping[str, StoredTensor], raw: Mapping[str, Any], findings: Findings) -> None:
    """Add modules and biases that were saved whole."""
    saved = raw.get("modules_to_save") or ()
    for name, tensor in rest.items():
        module = name.rpartition(".")[0]
        if any(f".{module}".endswith(f".{each}") or f".{each}." in f".{module}." for each in saved):
            findings.changes.append(Change(name.replace(".modules_to_save.default", ""), Full(tensor, may_add=True)))
        elif raw.get("bias", "none") != "none" and name.endswith(".bias"):
            findings.changes.append(Change(name.replace(".base_layer.", "."), Full(tensor)))
        else:
            findings.faults.append(Fault(tensor.name, "neither part of the method nor of modules_to_save"))


def _refuse_fields(raw: Mapping[str, Any], method: Method, source: Source, accepted: Collection[str]) -> None:
    """Raise UnsupportedError for fields of the config that are set and not known."""
    known = {*COMMON, *method.fields, *accepted}
    faults = [Fault(name, "a field this version does not know") for name in raw if name not in known and raw[name]]
    if faults:
        raise UnsupportedError(
            f"The adapter {source.name} uses what this version does not merge.",
            faults=faults,
            hint="--ignore-field NAME accepts a field that you know to change nothing",
        )


def _fit(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return VeRA with A as wide as each weight, and (IA)³ with the biases that are multiplied, too."""
    changes: list[Change] = []
    for change in adapter.changes:
        update, W = change.update, weight_of(change.target, base)
        if isinstance(update, LowRank) and update.b and W:
            width = W.numel // max(1, update.outputs)
            A = view(update.A, columns=range(min(width, update.A.shape[1])))
            change = replace(change, update=replace(update, A=A))  # noqa: PLW2901 - the same change, fitted
        changes.append(change)
        bias = f"{change.module}.bias"
        by_rows = isinstance(update, Decomposed) and update.axis == "rows"
        if by_rows and weight_of(bias, base):
            changes.append(Change(bias, Follows(change.target), rule="as its weight"))
    return replace(adapter, changes=tuple(changes))


def is_method(kind: object) -> bool:
    """Return True for the `peft_type` of one of these methods."""
    return isinstance(kind, str) and kind.upper() in METHODS
