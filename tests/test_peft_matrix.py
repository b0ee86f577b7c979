"""PEFT is the oracle for everything it can put on disk: what base + adapter compute, the merged model must."""

from __future__ import annotations

import json
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file

import dora_convert
from dora_convert.errors import DoraConvertError

from . import peft_cases as tiny
from . import toy
from .peft_cases import (
    GROWN,
    SIGNAL,
    Case,
    adalora,
    bert,
    distance,
    fields,
    gpt2,
    llama,
    lora,
    opened,
    oracle,
    outputs,
    renamed,
)

HALF, ALL = ("float32", "bfloat16", "float16"), ["embed_tokens", "lm_head"]
TOLERANCE = {"float32": 5e-6, "bfloat16": 8e-3, "float16": 1e-3}
UNTIED, TIED = {"tie_word_embeddings": False}, llama(tie_word_embeddings=True)
LABELS = {f"id2label.{i}": f"LABEL_{i}" for i in range(3)} | {f"label2id.LABEL_{i}": i for i in range(3)}
QV, GPT2 = ["query", "value"], ["c_attn", "c_proj", "c_fc"]
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
BLOCKS = BdLoraConfig(["o_proj", "down_proj"], ["q_proj", "up_proj"], nblocks=2, match_strict=False)


def headed(kind: str, *left: str) -> partial[Case]:
    """A classifier that the base's files lack; `left` are the base's own heads, which it has no use for."""
    return partial(Case, opened=kind, labels=3, left=left, says={"architectures": [kind], **LABELS})


dora = partial(lora, use_dora=True)
scored = headed("LlamaForSequenceClassification", "lm_head")
classed = headed("BertForSequenceClassification", "cls.")
tagged = headed("BertForTokenClassification", "cls.", "pooler", "bert.pooler")
grew = partial(Case, before=tiny.grown, says={"vocab_size": 75}, inputs=GROWN)
names = partial(Case, llama(), dora())

CASES = {
    # biases
    "lora_bias": Case(bert("BertForMaskedLM"), lora(target_modules=[*QV, "dense"], lora_bias=True), dtypes=HALF),
    "lora_bias conv1d": Case(gpt2(), lora(target_modules=GPT2, lora_bias=True)),
    "lora_bias conv": Case(tiny.plain, lora(target_modules=["conv1", "conv2", "linear"], lora_bias=True), inputs=SIGNAL),
    "bias all": Case(bert("BertForMaskedLM"), lora(target_modules=QV, bias="all"), dtypes=HALF),
    "bias lora_only": Case(bert("BertForMaskedLM"), lora(target_modules=QV, bias="lora_only")),
    "bias before 0.7": Case(bert("BertForMaskedLM"), lora(target_modules=QV, bias="all"), edit=renamed((".base_layer.bias", ".bias"))),
    "bias all dora": Case(gpt2(), dora(target_modules=GPT2, bias="all")),
    "bias all lora_bias": Case(bert("BertForMaskedLM"), lora(target_modules=QV, bias="all", lora_bias=True)),
    # heads the base lacks
    "score": scored(llama(), lora(modules_to_save=["score"])),
    "score dora": scored(llama(), dora(modules_to_save=["score"]), dtypes=HALF, slack=3),
    "score task": scored(llama(), lora(task_type="SEQ_CLS")),
    "score tied": scored(TIED, lora(task_type="SEQ_CLS")),
    "score LlamaModel": scored(llama("LlamaModel"), lora(task_type="SEQ_CLS")),
    "classifier BertModel": classed(bert("BertModel"), lora(target_modules=QV, modules_to_save=["classifier"])),
    "classifier BertModel task": classed(bert("BertModel"), dora(target_modules=QV, task_type="SEQ_CLS")),
    "classifier and pooler": classed(bert("BertForMaskedLM"), lora(target_modules=QV, modules_to_save=["classifier", "pooler"])),
    "classifier pretraining": classed(bert("BertForPreTraining"), lora(target_modules=QV, task_type="SEQ_CLS")),
    "token classifier": tagged(bert("BertForMaskedLM"), lora(target_modules=QV, task_type="TOKEN_CLS")),
    "token classifier BertModel": tagged(bert("BertModel"), lora(target_modules=QV, modules_to_save=["classifier"])),
    "modules_to_save norms": Case(llama(), lora(modules_to_save=["norm", "lm_head"])),
    # tied embeddings: PEFT's forward adds each side's update to that side alone, so one-sided training unties
    "tied embed": Case(TIED, lora(target_modules=["q_proj", "embed_tokens"]), says=UNTIED, dtypes=HALF),
    "tied head": Case(TIED, lora(target_modules=["q_proj", "lm_head"]), says=UNTIED),
    "tied both": Case(TIED, lora(target_modules=ALL), says=UNTIED),
    "tied embed dora": Case(TIED, dora(target_modules=["q_proj", "embed_tokens"]), says=UNTIED),
    "tied head dora": Case(TIED, dora(target_modules=["q_proj", "lm_head"]), says=UNTIED, dtypes=HALF),
    "tied both dora": Case(TIED, dora(target_modules=ALL), says=UNTIED),
    "tied gpt2 embed": Case(gpt2(), lora(target_modules=["wte", "c_attn"]), says=UNTIED),
    "tied gpt2 head dora": Case(gpt2(), dora(target_modules=["lm_head", "c_attn"]), says=UNTIED),
    "tied save embed": Case(TIED, lora(modules_to_save=["embed_tokens"]), says=UNTIED),
    "tied save head": Case(TIED, lora(modules_to_save=["lm_head"]), says=UNTIED),
    "tied save both": Case(TIED, lora(modules_to_save=ALL), says=UNTIED),
    "tied ensured save": Case(TIED, lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tied ensured targets": Case(TIED, lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)),
    "tied vision": Case(tiny.qwen3_vl, lora(target_modules=["q_proj", "embed_tokens"]), says={**UNTIED, "text_config.tie_word_embeddings": False}),
    "tied vision renamed": Case(tiny.gemma3, lora(target_modules=["q_proj", "embed_tokens"]), says={**UNTIED, "text_config.tie_word_embeddings": False}, may_refuse=True),
    "untied embed and head": Case(llama(), dora(target_modules=ALL)),
    "tokens tied": Case(TIED, lora(trainable_token_indices=[9, 2, 58])),
    "tokens untied": Case(llama(), lora(trainable_token_indices=[9, 2, 58]), dtypes=HALF),
    "tokens tied dict": Case(TIED, lora(trainable_token_indices={"embed_tokens": [9, 2]})),
    "tokens two dicts": Case(llama(), lora(trainable_token_indices={"embed_tokens": [9, 2], "lm_head": [5, 2, 0]})),
    "tokens gpt2": Case(gpt2(), lora(target_modules=["c_attn"], trainable_token_indices={"wte": [41, 2]})),
    # a vocabulary that grew in memory; the base's files have the old one
    "grown": grew(llama(), lora()),
    "grown tied": grew(TIED, lora(), dtypes=HALF),
    "grown both": grew(llama(), lora(target_modules=[*ALL, "q_proj"])),
    "grown saved": grew(llama(), lora(modules_to_save=ALL)),
    "grown tied without head": grew(TIED, lora(), edit=renamed(lost="lm_head")),
    # parameters that are no layer's weight
    "gpt_oss": Case(tiny.gpt_oss(40), lora(**EXPERTS), dtypes=HALF),
    "gpt_oss one": Case(tiny.gpt_oss(40), lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])),
    "gpt_oss square": Case(tiny.gpt_oss(32), lora(**EXPERTS)),
    "gpt_oss square one": Case(tiny.gpt_oss(32), lora(target_modules=[], target_parameters=["experts.down_proj"])),
    "parameters": Case(tiny.plain, lora(target_modules=["linear"], target_parameters=["experts.up", "experts.down", "last.matrix"]), inputs=SIGNAL),
    "split experts": Case(tiny.qwen3_moe, lora(**EXPERTS), may_refuse=True),  # fused in memory, not in the base's files
    "parameter weight": Case(tiny.plain, lora(target_modules=[], target_parameters=["router.weight"]), inputs=SIGNAL),
    # layers
    "replicated": Case(llama(num_hidden_layers=3), lora(layer_replication=[[0, 2], [1, 3]]), says={"num_hidden_layers": 4}),
    "replicated dora": Case(llama(num_hidden_layers=3), dora(layer_replication=[[0, 3], [0, 2]]), says={"num_hidden_layers": 5}),
    # PEFT adds out_proj's delta twice, while training too
    "attention": Case(tiny.plain, lora(target_modules=["attn", "linear"]), inputs=SIGNAL),
    "attention bias": Case(tiny.plain, lora(target_modules=["attn"], bias="all"), inputs=SIGNAL),
    "gpt2": Case(gpt2(), dora(target_modules=GPT2), dtypes=HALF),
    "bert": Case(bert("BertForMaskedLM"), dora(target_modules=QV)),
    "t5": Case(tiny.t5, lora(target_modules=["q", "v"]), inputs=tiny.SEQUENCES),
    "t5 dora": Case(tiny.t5, dora(target_modules=["q", "v", "wi", "wo"]), inputs=tiny.SEQUENCES),
    "resnet": Case(tiny.resnet, dora(target_modules=["convolution"], modules_to_save=["classifier"]), inputs=tiny.IMAGE),
    "patterns overlap": Case(llama(), dora(rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 5}, alpha_pattern={"layers.1.mlp.down_proj": 20, "proj": 3})),
    "all-linear": Case(llama(), dora(target_modules="all-linear"), dtypes=HALF),
    # names
    "magnitude weight": names(edit=renamed(("magnitude_vector", "magnitude_vector.weight"))),
    "magnitude default": names(edit=renamed(("magnitude_vector", "magnitude_vector.default.weight"), (".lora_A.", ".lora_A.default."), (".lora_B.", ".lora_B.default."))),
    "magnitude 0.9": names(edit=renamed(("magnitude_vector", "magnitude_vector.default"))),
    "embedding default": Case(llama(), dora(target_modules=ALL), edit=renamed(("embedding_A", "embedding_A.default"), ("embedding_B", "embedding_B.default"))),
    "compiled": names(edit=renamed(("base_model.model.", "base_model.model._orig_mod."))),
    "compiled whole": names(edit=renamed(("base_model.", "_orig_mod.base_model."))),
    "compiled layers": names(edit=renamed((".self_attn.", "._orig_mod.self_attn."), (".mlp.", "._orig_mod.mlp."))),
    "data parallel": names(edit=renamed(("base_model.", "module.base_model."))),
    "fsdp": names(edit=renamed((".layers.", "._fsdp_wrapped_module.layers."), (".self_attn.", "._fsdp_wrapped_module.self_attn."))),
    "checkpointed": names(edit=renamed((".self_attn.", "._checkpoint_wrapped_module.self_attn."))),
    "no prefix": names(edit=renamed(("base_model.model.", ""))),
    "trained on AutoModel": Case(llama(), dora(), opened="LlamaModel", left=("lm_head",)),
    "trained with a head": Case(llama("LlamaModel", tie_word_embeddings=True), dora(), opened="LlamaForCausalLM"),
    "gpt2 headless base": Case(gpt2("GPT2Model"), dora(target_modules=GPT2), opened="GPT2LMHeadModel"),
    "gpt2 headless adapter": Case(gpt2(), lora(target_modules=GPT2), opened="GPT2Model"),
    "gpt2 headless untied": Case(gpt2("GPT2Model"), lora(target_modules=["wte", "c_attn"]), opened="GPT2LMHeadModel", says=UNTIED),
    "pickled": names(edit=tiny.pickled),
    # other methods
    "adalora": Case(llama(), adalora(target_modules=["q_proj", "down_proj"]), dtypes=HALF),
    "adalora pruned": Case(llama(), adalora(target_modules=["q_proj", "down_proj"]), after=tiny.pruned),
    "adalora conv1d": Case(gpt2(), adalora(target_modules=["c_attn", "c_proj"]), after=tiny.pruned),
    "adalora conv2d": Case(tiny.plain, adalora(target_modules=["conv2", "linear"]), inputs=SIGNAL),
    "bdlora": Case(llama(), lora(target_modules=["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"], use_bdlora=BLOCKS), dtypes=HALF),
    "velora": Case(llama(), lora(velora_config=VeloraConfig(num_groups=4, init_type="random"))),
    "monteclora": Case(llama(), lora(monteclora_config=MontecloraConfig())),
    "mica": Case(llama(), lora(init_lora_weights="mica")),
    "kasa": Case(llama(), lora(kasa_config=KasaConfig()), dtypes=HALF, slack=2),
    # initialisations
    "gaussian": Case(llama(), dora(init_lora_weights="gaussian")),
    "orthogonal": Case(llama(), dora(init_lora_weights="orthogonal")),
    "eva": Case(llama(), lora(rank_pattern={"model.layers.0.self_attn.q_proj": 3}, alpha_pattern={"model.layers.0.self_attn.q_proj": 5}), edit=fields(init_lora_weights="eva", eva_config={"rho": 2.0})),
    "pissa": Case(llama(), lora(init_lora_weights="pissa"), dtypes=HALF, slack=2),
    "pissa dora": Case(llama(), dora(init_lora_weights="pissa"), dtypes=HALF, slack=2),
    # an adapted head's base_layer is saved, and is the residual already; it is the embedding's too where they are tied;
    # an embedding stays what it was; layers that share a weight take the top of it away one after the other
    "pissa head": Case(llama(), lora(target_modules=["q_proj", "lm_head"], init_lora_weights="pissa"), slack=2),
    "kasa head": Case(llama(), lora(target_modules=["q_proj", "lm_head"], kasa_config=KasaConfig()), slack=2),
    "pissa embed": Case(llama(), lora(target_modules=["q_proj", "embed_tokens"], init_lora_weights="pissa"), slack=2),
    "pissa tied head": Case(TIED, lora(target_modules=["q_proj", "lm_head"], init_lora_weights="pissa"), says=UNTIED, slack=2, may_refuse=True),
    "pissa replicated": Case(llama(), lora(init_lora_weights="pissa", layer_replication=[[0, 2], [0, 2]]), says={"num_hidden_layers": 4}, slack=2, may_refuse=True),
    "pissa conv1d": Case(gpt2(), lora(target_modules=GPT2, init_lora_weights="pissa", use_rslora=True), slack=2),
    "olora": Case(llama(), lora(init_lora_weights="olora"), dtypes=HALF, slack=2),
    "olora dora": Case(llama(), dora(init_lora_weights="olora"), slack=2),
}  # fmt: skip

REFUSED = {
    # PEFT's lora_A sees every input channel and not only its group's: no grouped kernel does that
    "grouped convolution": (Case(tiny.grouped, lora(target_modules=["1"]), inputs=SIGNAL), "group"),
    "lora_bias without a bias": (Case(llama(), lora(lora_bias=True)), "bias"),
    # PEFT saves only the one it adapts; the other's new rows are nowhere
    "grown embed": (grew(llama(), dora(target_modules=["embed_tokens", "q_proj"])), "lm_head"),
    "grown without head": (grew(llama(), lora(), edit=renamed(lost="lm_head")), "lm_head"),
    "pissa_niter": (names(edit=fields(init_lora_weights="pissa_niter_4")), "pissa_niter_4"),
    "corda": (names(edit=fields(init_lora_weights="corda", corda_config={"corda_method": "kpm"})), "corda"),
    "loftq": (names(edit=fields(init_lora_weights="loftq", loftq_config={"loftq_bits": 4})), "loftq"),
    "lora_ga": (names(edit=fields(init_lora_weights="lora_ga", lora_ga_config={"stable_gamma": 16})), "lora_ga"),
    "unknown initialisation": (names(edit=fields(init_lora_weights="warp")), "warp"),
    "alora": (names(edit=fields(alora_invocation_tokens=[1, 2])), "alora_invocation_tokens"),
    "arrow": (names(edit=fields(arrow_config={"top_k": 3})), "arrow_config"),
    "unknown field": (names(edit=fields(use_quantum=True)), "use_quantum"),
    "unknown type": (names(edit=fields(peft_type="QUANTUM")), "QUANTUM"),
    "x-lora": (names(edit=fields(peft_type="XLORA")), "XLORA"),
    "prompt tuning": (names(edit=fields(peft_type="PROMPT_TUNING")), "PROMPT_TUNING"),
    "no alpha": (names(edit=fields(lora_alpha=0)), "lora_alpha"),
    "magnitudes missing": (names(edit=renamed(lost="magnitude")), "magnitude"),
    "magnitudes unasked for": (names(edit=fields(use_dora=False)), "use_dora"),
    "half a pair": (names(edit=renamed(lost="layers.1.mlp.down_proj.lora_B")), "lora_B"),
    "other rank": (names(edit=fields(r=8)), "rank"),
    "blocks unmentioned": (Case(llama(), lora(target_modules=["q_proj", "o_proj"], use_bdlora=BLOCKS), edit=fields(use_bdlora=None)), "o_proj"),
}  # fmt: skip


@contextmanager
def noisy():
    """PEFT and transformers warn of much that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def merge(tmp_path: Path) -> None:
    dora_convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes])
def test_merged_is_what_peft_computes(tmp_path, name, dtype):
    """The merged model loads without a tensor missing and computes what was trained."""
    case = CASES[name]
    with noisy():
        want = oracle(case, dtype, tmp_path)
    try:
        merge(tmp_path)
    except DoraConvertError:
        if case.may_refuse:
            return
        raise
    with noisy():
        merged, info = opened(case, tmp_path / "out")
        got = outputs(merged, case.inputs)
    assert not info["missing_keys"]
    assert not info.get("mismatched_keys")
    assert all(key.startswith(case.left) for key in info["unexpected_keys"])
    assert distance(got, want) <= TOLERANCE[dtype] * case.slack
    written = load_file(tmp_path / "out/model.safetensors").values()
    assert {x.dtype for x in written if x.is_floating_point()} == {getattr(torch, dtype)}
    check_config(case, tmp_path)
    found = dora_convert.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", samples=2)
    assert found.problems == ()
    for module in found.modules:
        assert (module.output_error or 0) <= 1.1 * (module.output_floor or 0) + 2e-6


def check_config(case: Case, tmp_path: Path) -> None:
    """config.json says what must have changed, and nothing else."""
    if not (tmp_path / "base/config.json").exists():
        return
    base, out = (flat(json.loads((tmp_path / name / "config.json").read_text())) for name in ("base", "out"))
    changed = {key: value for key, value in out.items() if base.get(key) != value}
    if case.opened and "architectures" not in case.says:  # a base saved without its head may be named by it
        changed.pop("architectures", None)
    assert changed == case.says
    assert base.keys() <= out.keys()


def flat(config: dict) -> dict:
    """Nested keys with dots."""
    found = {}
    for key, value in config.items():
        found |= {f"{key}.{k}": v for k, v in flat(value).items()} if isinstance(value, dict) else {key: value}
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(tmp_path, name):
    """One error that names the culprit; nothing is written."""
    case, word = REFUSED[name]
    with noisy():
        oracle(case, "float32", tmp_path)
    before = toy.contents(tmp_path / "base")
    with pytest.raises(DoraConvertError) as caught:
        merge(tmp_path)
    assert word in caught.value.text()
    assert not list(tmp_path.glob("out*"))
    assert toy.contents(tmp_path / "base") == before


def test_several_adapters_by_weight(tmp_path):
    """W + Σ wᵢ·(applyᵢ(W) − W), DoRA's norm on the unmerged W."""
    base = toy.make_base(tmp_path / "base", torch.float32, shards=1)
    first = toy.make_adapter(tmp_path / "first", base, dora=False, seed=2)
    second = toy.make_adapter(tmp_path / "second", base, dora=True, seed=4, targets=["q_proj", "up_proj"])
    third = toy.make_adapter(tmp_path / "third", base, dora=False, seed=6, use_rslora=True)
    weights = (0.7, -0.4, 1.5)
    dora_convert.merge(tmp_path / "base", [first, second, third], tmp_path / "out", weight=weights)
    scales = (toy.ALPHA / toy.RANK, toy.ALPHA / toy.RANK, toy.ALPHA / toy.RANK**0.5)
    each = [toy.exact(base, path, scale=s) for path, s in zip((first, second, third), scales, strict=True)]
    for name, got in toy.load(tmp_path / "out").items():
        W = base.tensors[name].double()
        want = W + sum(w * (applied[name] - W) for w, applied in zip(weights, each, strict=True))
        assert (got - want.float()).abs().max() <= 2e-7 * want.abs().max(), name
