"""Trained weights beside an adapter's own file: applied where the base has their names, else refused by name.

Their names are those that LLaVA, Qwen-VL's trainers, LongLoRA, vLLM's post-processing, LLaMA-Factory and TRL give them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import dora_convert
from dora_convert.errors import DoraConvertError

from .toy import load, make_adapter

PREFIX = "base_model.model."
NORM = "model.layers.0.input_layernorm.weight"


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A weight file, by its name's ending."""
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, {"format": "pt"})
    else:
        torch.save(tensors, path)


def beside(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What LLaVA and Qwen-VL's trainers save beside the adapter: what was trained and is no LoRA."""
    return {name: tensor for name, tensor in tensors.items() if "lora_" not in name and tensor.requires_grad}


class Trained(NamedTuple):
    base: Path
    adapter: Path
    merged: dict[str, torch.Tensor]
    beside: dict[str, torch.Tensor]


def train(tmp_path, *, dora=False, **config) -> Trained:
    """A Llama whose norms and one bias were trained beside an adapter; `merged` is PEFT's."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 70, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "base")
    targets = ["k_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, use_dora=dora, target_modules=targets, **config))
    for name, parameter in model.named_parameters():
        if name.endswith(("layernorm.weight", "norm.weight", "k_proj.base_layer.bias")):
            parameter.requires_grad_(True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 1 + 0.2 * torch.randn_like(parameter) if "magnitude" in name else 1
                parameter.mul_(scale).add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    others = beside(dict(model.named_parameters()))
    others = {name: tensor.detach().clone() for name, tensor in others.items()}
    assert f"{PREFIX}{NORM}" in others
    return Trained(tmp_path / "base", tmp_path / "adapter", model.merge_and_unload().state_dict(), others)


def same(out: Path, want: dict[str, torch.Tensor]) -> None:
    got = load(out)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor.detach(), rtol=1e-5, atol=1e-6, msg=name)


WRITERS = {  # file, and what becomes of PEFT's names in it
    "LLaVA": ("non_lora_trainables.bin", lambda name: name),
    "Qwen-VL": ("non_lora_state_dict.bin", lambda name: name),
    "LongLoRA": ("trainable_params.bin", lambda name: name.removeprefix(PREFIX).replace(".base_layer", "")),
    "LLaVA's first stage": ("mm_projector.bin", lambda name: name),
    "safetensors": ("non_lora_state_dict.safetensors", lambda name: name),
    "an unknown name": ("what_i_trained.pt", lambda name: name.removeprefix(PREFIX)),
}


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("writer", WRITERS)
def test_applied_where_the_base_has_their_names(tmp_path, writer, dora):
    """The merged model is PEFT's, norms included; the ledger has every tensor, verify agrees, unmerge takes them out."""
    file, rename = WRITERS[writer]
    made = train(tmp_path, dora=dora)
    tensors = {rename(name): tensor for name, tensor in made.beside.items()}
    write(made.adapter / file, tensors)
    report = dora_convert.merge(made.base, made.adapter, tmp_path / "out", undo="exact")
    same(tmp_path / "out", made.merged)
    entries = {entry["tensor"]: entry for entry in report.ledger if file in entry["why"]}
    assert entries.keys() == tensors.keys()
    assert {entry["fate"] for entry in entries.values()} == {"replaced"}
    assert {name for entry in entries.values() for name in entry["into"]} == {
        name.removeprefix(PREFIX).replace(".base_layer", "") for name in made.beside
    }
    assert report.verified.wrong_elements == 0
    assert dora_convert.verify(made.base, made.adapter, tmp_path / "out").verdict == "agree"
    dora_convert.unmerge(tmp_path / "out", made.adapter, tmp_path / "back")
    same(tmp_path / "back", load(made.base))


def test_what_both_files_have_counts_once(tmp_path):
    """A module of modules_to_save is in the adapter's file and in LLaVA's: equal values are one, others contradict."""
    made = train(tmp_path, modules_to_save=["lm_head"])
    name = f"{PREFIX}lm_head.modules_to_save.default.weight"
    assert name in made.beside
    write(made.adapter / "non_lora_trainables.bin", made.beside)
    dora_convert.merge(made.base, made.adapter, tmp_path / "out")
    same(tmp_path / "out", made.merged)
    write(made.adapter / "non_lora_trainables.bin", made.beside | {name: made.beside[name] + 1})
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(made.base, made.adapter, tmp_path / "again")
    assert "lm_head" in caught.value.text()
    assert "non_lora_trainables.bin" in caught.value.text()


def test_new_rows_beside_the_adapter(tmp_path, base, adapter):
    """LongLoRA's embedding with one token more, and its head."""
    names = "model.embed_tokens.weight", "lm_head.weight"
    rows = {name: torch.cat([base.tensors[name] * 1.5, torch.ones(1, 40).bfloat16()]) for name in names}
    write(adapter / "trainable_params.bin", rows)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert all(torch.equal(load(tmp_path / "out")[name], rows[name]) for name in names)


X = torch.randn(3, 40)
MAGNITUDE = f"{PREFIX}model.layers.0.mlp.up_proj.weight_m_wdecomp.default.weight"
HOMELESS = {
    "non_lora_trainables.bin": {f"{PREFIX}model.mm_projector.0.weight": X, f"{PREFIX}model.mm_projector.0.bias": X[0]},
    "non_lora_state_dict.bin": {f"{PREFIX}visual.merger.mlp.0.weight": X},
    "trainable_params.bin": {"model.layers.9.input_layernorm.weight": X[0]},
    "mm_projector.bin": {"model.mm_projector.weight": X},
    "new_embeddings.safetensors": {"input_embeddings": X, "output_embeddings": X},
    "new_embeddings.bin": {"input_embeddings": X},
    "value_head.safetensors": {"v_head.summary.weight": X[:1], "v_head.summary.bias": X[0, :1]},
    "value_head.bin": {"v_head.summary.weight": X[:1]},
    "pytorch_model.bin": {"v_head.summary.weight": X[:1], "v_head.summary.bias": X[0, :1]},
    "vit.safetensors": {"visual.blocks.0.attn.weight": X},
    "consolidated.pth": {"anything": X},
}  # fmt: skip
"""Files and tensors that a text model has no place for. The first of NVlabs' DoRA holds its magnitudes: see below."""


def shut(names: dict[str, torch.Tensor], text: str) -> bool:
    return all(name in text or name.removeprefix(PREFIX) in text for name in names)


@pytest.mark.parametrize("file", HOMELESS)
def test_refused_where_it_has_not(tmp_path, base, adapter, file, run):
    """An error with the file, its tensors and the option that goes on without them; then the ledger lists them."""
    write(adapter / file, HOMELESS[file])
    out = tmp_path / "out"
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, adapter, out)
    error = caught.value
    assert file in error.text()
    assert shut(HOMELESS[file], error.text())
    assert f"ignore_file={file!r}" in (error.hint or "")
    assert not out.exists()
    report = dora_convert.merge(base.path, adapter, out, ignore_file=file)
    entries = [entry for entry in report.ledger if entry["tensor"] in HOMELESS[file]]
    assert len(entries) == len(HOMELESS[file])
    assert all(entry["fate"] == "ignored" and file in entry["why"] for entry in entries)
    assert any(file in text for text in report.warnings)
    (adapter / file).unlink()
    dora_convert.merge(base.path, adapter, tmp_path / "without")
    assert all(torch.equal(x, load(out)[name]) for name, x in load(tmp_path / "without").items())
    write(adapter / file, HOMELESS[file])
    assert run("merge", base.path, adapter, tmp_path / "cli", "-q")[0] == 2
    assert run("merge", base.path, adapter, tmp_path / "cli", "-q", "--ignore-file", file)[0] == 0


def test_magnitudes_that_nvlabs_dora_leaves_there(tmp_path, base, adapter):
    """visual_instruction_tuning saves DoRA's magnitudes as `non_lora_trainables.bin`; without them it is another model."""
    write(adapter / "non_lora_trainables.bin", {MAGNITUDE: torch.rand(96, 1)})
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert "weight_m_wdecomp" in caught.value.text()
    assert "non_lora_trainables.bin" in caught.value.text()


def test_one_tensor_without_a_place_stops_the_others(tmp_path, base, adapter):
    """Nothing is applied in part, and only what has no place is listed; a shape that does not fit says so."""
    norm = base.tensors[NORM] + 1
    write(adapter / "non_lora_state_dict.bin", {NORM: norm, "visual.merger.weight": X})
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert "visual.merger.weight" in caught.value.text()
    assert NORM not in caught.value.text()
    write(adapter / "non_lora_state_dict.bin", {NORM: norm[:-1]})
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert all(word in caught.value.text() for word in (NORM, "39", "non_lora_state_dict.bin"))


def test_several_files(tmp_path, base, adapter):
    """The error has all of them; each has its own option."""
    files = ["value_head.safetensors", "mm_projector.bin"]
    for file in files:
        write(adapter / file, HOMELESS[file])
    for ignored in (files[:1], []):
        with pytest.raises(DoraConvertError) as caught:
            dora_convert.merge(base.path, adapter, tmp_path / "out", ignore_file=ignored)
        left = [file for file in files if file not in ignored]
        assert all((file in caught.value.text()) == (file in left) for file in files)
        assert all(f"ignore_file={file!r}" in caught.value.hint for file in left)
    dora_convert.merge(base.path, adapter, tmp_path / "out", ignore_file=files)
    with pytest.raises(DoraConvertError, match=r"no_such\.bin"):
        dora_convert.merge(base.path, adapter, tmp_path / "again", ignore_file=[*files, "no_such.bin"])


def test_a_weight_is_for_changes(tmp_path, base, adapter):
    """What a file replaces has no half strength."""
    write(adapter / "non_lora_state_dict.bin", {NORM: base.tensors[NORM] + 1})
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out", weight=0.5)
    assert "0.5" in caught.value.text()


OF_TRAINING = (
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt", "training_args.bin",
    "adapter_model.bin", "random_states_0.pkl", "trainer_state.json", "checkpoint-10/non_lora_trainables.bin",
    "global_step10/mp_rank_00_model_states.pt", "runs/x.bin",
)  # fmt: skip


def test_what_training_leaves_is_none_of_it(tmp_path, base, adapter):
    """Optimiser states and the like, the same adapter as a pickle, and folders of other steps."""
    clean = dora_convert.merge(base.path, adapter, tmp_path / "clean").warnings
    for file in OF_TRAINING:
        (adapter / file).parent.mkdir(exist_ok=True)
        torch.save({"x": X}, adapter / file)
    assert dora_convert.merge(base.path, adapter, tmp_path / "out").warnings == clean


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_whole_model_beside_the_adapter_is_not_applied(tmp_path, base, adapter, file):
    """Trainers put the merged model, or all that ZeRO gathered, there: applied, the change would come twice. It is said."""
    dora_convert.merge(base.path, adapter, tmp_path / "once")
    whole = load(tmp_path / "once")
    if file.endswith(".bin"):
        whole = {PREFIX + name: tensor for name, tensor in whole.items()}
        whole |= load_file(adapter / "adapter_model.safetensors")
    write(adapter / file, whole)
    report = dora_convert.merge(base.path, adapter, tmp_path / "out")
    once = load(tmp_path / "once")
    assert all(torch.equal(once[name], x) for name, x in load(tmp_path / "out").items())
    assert any(file in text and "model" in text for text in report.warnings)


def test_verify_knows_what_was_ignored(tmp_path, base, adapter):
    """From the receipt, and from the option where there is none; without either it does not decide."""
    write(adapter / "value_head.bin", HOMELESS["value_head.bin"])
    dora_convert.merge(base.path, adapter, tmp_path / "out", ignore_file="value_head.bin")
    assert dora_convert.verify(base.path, adapter, tmp_path / "out").verdict == "agree"
    for file in (tmp_path / "out/dora_convert").iterdir():
        file.unlink()
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.verify(base.path, adapter, tmp_path / "out")
    assert "value_head.bin" in caught.value.text()
    report = dora_convert.verify(base.path, adapter, tmp_path / "out", ignore_file=["value_head.bin"])
    assert report.verdict == "agree"


def test_inspect_says_where_they_would_go(tmp_path, base, adapter, run):
    """The file is named with and without a base; with one, so is what has no place."""
    write(adapter / "non_lora_state_dict.bin", {NORM: base.tensors[NORM], "visual.merger.weight": X})
    report = dora_convert.inspect(adapter)
    assert any("non_lora_state_dict.bin" in note and "2 tensors" in note for note in report.notes)
    landing = dora_convert.inspect(adapter, base.path).landing
    assert not landing.fits
    assert [fault["what"] for fault in landing.faults] == ["visual.merger.weight"]
    code, text, _ = run("inspect", adapter, "--json")
    assert (code, "non_lora_state_dict.bin" in json.dumps(json.loads(text)["notes"])) == (0, True)


@pytest.mark.parametrize("verb", ["from_lora", "to_lora"])
def test_adapters_made_of_it_do_not_lose_them(tmp_path, base, verb):
    """An adapter of another kind either does what the first one does with its files, or is refused with their names."""
    adapter = make_adapter(tmp_path / "lora", base, dora=False)
    write(adapter / "non_lora_state_dict.bin", {NORM: base.tensors[NORM] * 2})
    options = {"rank": 4} if verb == "to_lora" else {}
    try:
        getattr(dora_convert, verb)(base.path, adapter, tmp_path / "made", **options)
    except DoraConvertError as error:
        assert "non_lora_state_dict.bin" in error.text()  # noqa: PT017 - one of two right answers
    else:
        dora_convert.merge(base.path, tmp_path / "made", tmp_path / "out")
        assert torch.equal(load(tmp_path / "out")[NORM], base.tensors[NORM] * 2)


def test_a_damaged_file_is_named(tmp_path, base, adapter):
    """No pickle of tensors: the file is named, and the option."""
    (adapter / "non_lora_trainables.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DoraConvertError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert "non_lora_trainables.bin" in caught.value.text()
    dora_convert.merge(base.path, adapter, tmp_path / "out", ignore_file="non_lora_trainables.bin")
    nan = base.tensors[NORM] * torch.nan
    write(adapter / "non_lora_trainables.bin", {NORM: nan})
    with pytest.raises(DoraConvertError, match=r"NaN|damaged"):
        dora_convert.merge(base.path, adapter, tmp_path / "again")
