"""inspect of adapters: what they are, what they hold, and where it would land."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_convert

from .test_inspect import DOWN, EMBEDDING, HEAD, modules
from .toy import HIDDEN, VOCABULARY, edit_json, make_adapter, make_base, write_json, write_shards

# --- adapters ---------------------------------------------------------------------------------------------------------


def test_dora(base, adapter):
    """A DoRA adapter: what it is, its numbers, and every module with rank, scaling and the rule that gave it."""
    report = dora_convert.inspect(adapter)
    assert isinstance(report, dora_convert.AdapterReport)
    assert (report.kind, report.format, report.method) == ("adapter", "peft", "DoRA")
    assert (report.base, report.revision, report.task) == ("base", None, "ForCausalLM")
    tensors = sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    assert (report.tensors, report.parameters, report.bytes) == (18, tensors, 4 * tensors)
    assert report.dtypes == {"F32": {"tensors": 18, "parameters": tensors, "bytes": 4 * tensors}}
    assert len(report.modules) == 6
    found = modules(report)[DOWN]
    assert (found.method, found.rank, found.scaling, found.rule) == ("DoRA", 4, 1.5, "alpha 6 / rank 4")
    assert found.kind == "model.layers.*.mlp.down_proj.weight"
    assert len(found.tensors) == 3
    assert report.refused is report.landing is None
    assert not report.faults
    assert not report.notes


def test_patterns_and_rslora(tmp_path, base):
    """rank_pattern, alpha_pattern and rsLoRA: the effective numbers of each module, and where they come from."""
    adapter = make_adapter(
        tmp_path / "lora", base, dora=False, rank=8, r=4, use_rslora=True,
        rank_pattern={"mlp.*": 8, "self_attn.*": 8}, alpha_pattern={"up_proj": 16},
    )  # fmt: skip
    report = dora_convert.inspect(adapter)
    found = modules(report)
    up, down = found["model.layers.1.mlp.up_proj.weight"], found[DOWN]
    assert (report.method, up.method, up.rank) == ("LoRA", "LoRA", 8)
    assert up.scaling == pytest.approx(16 / 8**0.5)
    assert up.rule == "alpha 16 (alpha_pattern 'up_proj') / √rank 8 (rank_pattern 'mlp.*')"
    assert down.scaling == pytest.approx(6 / 8**0.5)
    assert down.rule == "alpha 6 / √rank 8 (rank_pattern 'mlp.*')"


def test_all_that_an_adapter_can_hold(tmp_path, base):
    """Modules saved whole, trained rows, biases, and tensors of training."""
    prefix = "base_model.model"
    extra = {
        f"{prefix}.lm_head.weight": torch.ones(VOCABULARY, HIDDEN),
        f"{prefix}.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(3, HIDDEN),
        f"{prefix}.model.layers.0.mlp.up_proj.lora_B.bias": torch.ones(96),
        f"{prefix}.model.layers.0.mlp.up_proj.lora_velora_embed": torch.ones(4, dtype=torch.float16),
    }
    adapter = make_adapter(
        tmp_path / "lora", base, dora=False, extra=extra, modules_to_save=["lm_head"], lora_bias=True,
        trainable_token_indices={"embed_tokens": [1, 2, 5]},
    )  # fmt: skip
    report = dora_convert.inspect(adapter)
    found = modules(report)
    assert (found[HEAD].method, found[HEAD].shape) == ("whole", (VOCABULARY, HIDDEN))
    assert (found[EMBEDDING].method, found[EMBEDDING].rows) == ("rows", 3)
    bias = found["model.layers.0.mlp.up_proj.bias"]
    assert (bias.method, bias.scaling, bias.shape) == ("bias", 1.5, (96,))
    assert list(report.ignored.values()) == ["used in training only"]
    assert report.dtypes["F16"] == {"tensors": 1, "parameters": 4, "bytes": 8}


def test_landing(base, adapter):
    """With a base: the ledger of the plan, and what would become of the base's tensors."""
    landing = dora_convert.inspect(adapter, base.path).landing
    assert landing.fits
    assert landing.message is None
    assert landing.tensors["merged"] == 6
    assert len(landing.ledger) == 18
    assert all(entry["fate"] == "merged" for entry in landing.ledger)
    into = {tuple(entry["into"]) for entry in landing.ledger}
    assert (DOWN,) in into
    dry = dora_convert.merge(base.path, adapter, base.path.parent / "out", dry_run=True)
    assert landing.ledger == dry.ledger
    assert not landing.warnings


def test_landing_elsewhere(tmp_path, base, adapter):
    """A base it does not fit is an answer: what has no place there with the reason, and what has."""
    other = make_base(tmp_path / "other", layers=1)
    landing = dora_convert.inspect(adapter, other.path).landing
    assert not landing.fits
    assert len(landing.faults) == 9
    assert "no place in the base" in landing.message
    assert {entry["fate"] for entry in landing.ledger} == {"merged", "unmatched"}
    assert landing.warnings == ("adapter was trained on base; BASE is other (llama)",)


def test_landing_with_other_shapes(tmp_path, base, adapter):
    """If shapes contradict the base, every fault is listed, and the ledger is left out."""
    wide = make_base(tmp_path / "wide")
    tensors = {name: torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 8) for name, tensor in wide.tensors.items()}
    write_shards(wide.path, tensors, 2)
    landing = dora_convert.inspect(adapter, wide.path).landing
    assert not landing.fits
    assert len(landing.faults) == 18
    assert not landing.ledger


def test_landing_in_a_quantised_base(base, adapter):
    """A config that says quantised over dense weights is a warning, not a refusal."""
    edit_json(base.path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    landing = dora_convert.inspect(adapter, base.path).landing
    assert landing.fits
    assert any("quantised (gptq), but its weights are dense" in warning for warning in landing.warnings)


def test_faults_in_an_adapter(run, tmp_path, base):
    """An adapter that contradicts itself is described with its faults."""
    adapter = make_adapter(tmp_path / "odd", base, dora=True, use_dora=False)
    report = dora_convert.inspect(adapter)
    assert len(report.faults) == 6
    assert not report.modules
    code, out, _ = run("inspect", adapter)
    assert code == 0
    assert "would not be merged: 6 faults" in out
    assert "use_dora is not set" in out


def test_refused_methods_are_described(run, tmp_path, base):
    """Methods and fields that are not merged: said so with the reason, and all that can be told is told."""
    adapter = make_adapter(tmp_path / "moved", base, dora=False, init_lora_weights="corda")
    report = dora_convert.inspect(adapter, base.path)
    assert "does not merge" in report.refused["message"]
    assert "statistics" in report.refused["faults"][0]["why"]
    assert len(report.modules) == 6
    assert not report.landing.fits
    assert dora_convert.inspect(adapter, ignore_field=["init_lora_weights"]).refused is None
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    write_json(prompts / "adapter_config.json", {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "org/base"})
    save_file({"prompt_embeddings": torch.zeros(8, HIDDEN)}, prompts / "adapter_model.safetensors")
    report = dora_convert.inspect(prompts)
    assert (report.method, report.base, report.tensors, report.modules) == ("PROMPT_TUNING", "org/base", 1, ())
    code, out, _ = run("inspect", prompts)
    assert code == 0
    assert "prompt_embeddings" in out
    assert "would not be merged: The adapter prompts is of peft_type 'PROMPT_TUNING'" in out


def test_an_adapter_beside_a_model(tmp_path, base, adapter):
    """A folder that is both: the adapter, and a note; naming one of its files decides."""
    write_shards(adapter, base.tensors, 1)
    report = dora_convert.inspect(adapter)
    assert report.kind == "adapter"
    assert report.notes == ("holds a model's weights, too: model.safetensors",)
    assert dora_convert.inspect(adapter / "model.safetensors").kind == "checkpoint"
    assert dora_convert.inspect(adapter / "adapter_model.safetensors").kind == "adapter"
