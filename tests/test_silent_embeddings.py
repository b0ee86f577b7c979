"""Vocabularies that grew with an adapter: PEFT's own model is the oracle, tied and untied, whatever its files hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import dora_convert
from dora_convert.errors import PlanError

from .toy import write_json

OLD, NEW, HIDDEN = 70, 72, 32
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PREFIX = "base_model.model."
IDS = torch.tensor([[2, 9, 5, 33, 12, 60, 41, 71, 70, 3]])
ALONE = {"save_embedding_layers": False}
"""What PEFT does, too, where it cannot look up the vocabulary of the base: only what was trained is in the file."""
SHORT = torch.tensor([[2, 9, 5, 33, 12, 60, 41, 3]])


class Trained(NamedTuple):
    """A base and an adapter on disk, and what the trained model says."""

    base: Path
    adapter: Path
    logits: torch.Tensor
    ids: torch.Tensor

    @property
    def file(self) -> Path:
        return self.adapter / "adapter_model.safetensors"

    def drop(self, *names: str) -> None:
        """Take tensors out of the adapter's file."""
        tensors = load_file(self.file)
        for name in names:
            del tensors[PREFIX + name]
        save_file(tensors, self.file, {"format": "pt"})


def train(tmp_path, *, tie=True, rows=NEW, save=None, **config) -> Trained:
    """A tiny Llama, its vocabulary resized to `rows`, and an adapter on q and v and whatever `config` says."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 56, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=OLD, **sizes, **heads, tie_word_embeddings=tie))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")  # PEFT looks its vocabulary up by its name
    if rows != OLD:
        model.resize_token_embeddings(rows)
    targets = config.pop("target_modules", ["q_proj", "v_proj"])
    model = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **config)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 1 + 0.2 * torch.randn_like(parameter) if "magnitude" in name else 1
                parameter.mul_(scale).add_(torch.randn_like(parameter) * 0.1)
        ids = IDS if rows >= NEW else SHORT
        logits = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "adapter", **(save or {}))
    return Trained(tmp_path / "base", tmp_path / "adapter", logits, ids)


def says(out: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a merged folder, as transformers loads it."""
    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(out).eval()(ids).logits


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def config_of(out: Path) -> tuple[bool, int]:
    config = json.loads((out / "config.json").read_text())
    return config["tie_word_embeddings"], config["vocab_size"]


SAVED = {
    "embedding": ({"modules_to_save": ["embed_tokens"]}, False),
    "head": ({"modules_to_save": ["lm_head"]}, False),
    "both": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "DoRA": ({"modules_to_save": ["embed_tokens"], "use_dora": True}, False),
    "nothing but LoRA": ({}, True),
    "LoRA on the embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "LoRA on the head": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "kept tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "rows": ({"trainable_token_indices": [70, 71]}, True),
    "old and new rows": ({"trainable_token_indices": [5, 71, 70]}, True),
    "rows by name": ({"trainable_token_indices": {"embed_tokens": [70, 71]}}, True),
    "one new row": ({"trainable_token_indices": [71]}, True),
}


LORA_ON = ["LoRA on the embedding", "LoRA on the head"]
BOTH = [(case, tie) for case in SAVED for tie in (True, False) if tie or case not in LORA_ON]


@pytest.mark.parametrize(("case", "tie"), BOTH)
def test_two_new_tokens_as_peft_saves_them(tmp_path, case, tie):
    """The merged model says what the trained one says; it is tied where the trained one was one weight."""
    config, stays = SAVED[case]
    made = train(tmp_path, tie=tie, **config)
    report = dora_convert.merge(made.base, made.adapter, tmp_path / "out")
    close(says(tmp_path / "out", made.ids), made.logits)
    assert config_of(tmp_path / "out") == (tie and stays, NEW)
    assert report.verified.wrong_elements == 0
    assert dora_convert.verify(made.base, made.adapter, tmp_path / "out").verdict == "agree"


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("rows", [NEW, OLD + 58, OLD - 4], ids=["two more", "padded to 128", "four fewer"])
def test_a_saved_embedding_unties_a_head_that_no_file_has(tmp_path, rows, dora):
    """modules_to_save trains one side. The head keeps the base's rows; its new rows began as the embedding's."""
    made = train(tmp_path, rows=rows, save=ALONE, modules_to_save=["embed_tokens"], use_dora=dora)
    assert f"{PREFIX}{HEAD}" not in load_file(made.file)
    report = dora_convert.merge(made.base, made.adapter, tmp_path / "out")
    out, base = load_file(tmp_path / "out/model.safetensors"), load_file(made.base / "model.safetensors")
    saved = load_file(made.file)[f"{PREFIX}{EMBEDDING}"]
    kept = min(rows, OLD)
    assert torch.equal(out[EMBEDDING], saved)
    assert out[HEAD].shape == (rows, HIDDEN)
    assert torch.equal(out[HEAD][:kept], base[EMBEDDING][:kept])
    assert torch.equal(out[HEAD][kept:], saved[kept:])
    close(says(tmp_path / "out", made.ids)[..., :kept], made.logits[..., :kept])
    assert config_of(tmp_path / "out") == (False, rows)
    warned = [text for text in report.warnings if HEAD in text]
    assert len(warned) == (rows > OLD)
    assert all(str(rows - OLD) in text and "embed_tokens" in text for text in warned)
    assert dora_convert.verify(made.base, made.adapter, tmp_path / "out").verdict == "agree"


def test_a_saved_head_unties_an_embedding_that_no_file_has(tmp_path):
    """The same the other way round."""
    made = train(tmp_path, save=ALONE, modules_to_save=["lm_head"])
    assert f"{PREFIX}{EMBEDDING}" not in load_file(made.file)
    report = dora_convert.merge(made.base, made.adapter, tmp_path / "out")
    out, base = load_file(tmp_path / "out/model.safetensors"), load_file(made.base / "model.safetensors")
    saved = load_file(made.file)[f"{PREFIX}{HEAD}"]
    assert torch.equal(out[HEAD], saved)
    assert torch.equal(out[EMBEDDING], torch.cat([base[EMBEDDING], saved[OLD:]]))
    assert config_of(tmp_path / "out") == (False, NEW)
    assert any("embed_tokens" in text and "lm_head" in text for text in report.warnings)


@pytest.mark.parametrize("save", [None, ALONE], ids=["both in the file", "one in the file"])
@pytest.mark.parametrize("prompt", ["w5 w33 w12 w9", "w2 w70 w9 w71 w4"], ids=["old tokens", "new tokens"])
def test_the_outputs_of_such_a_merge_agree(tmp_path, save, prompt):
    """The tool's own comparison of outputs does not contradict its merge, whichever file has the head's rows."""
    made = train(tmp_path, save=save, modules_to_save=["embed_tokens"])
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(NEW)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(made.adapter / "tokenizer.json"))
    write_json(made.adapter / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    dora_convert.merge(made.base, made.adapter, tmp_path / "out")
    found = dora_convert.verify(made.base, made.adapter, tmp_path / "out", level="outputs", prompt=prompt)
    assert found.verdict == "agree"


def test_an_embedding_saved_for_its_new_rows_alone_means_both_sides(tmp_path):
    """No modules_to_save: PEFT saved it because the vocabulary grew. Nobody trained it, so the tie holds."""
    made = train(tmp_path)
    made.drop("lm_head.weight")
    dora_convert.merge(made.base, made.adapter, tmp_path / "out")
    assert HEAD not in load_file(tmp_path / "out/model.safetensors")
    assert config_of(tmp_path / "out") == (True, NEW)
    close(says(tmp_path / "out", made.ids), made.logits)


def test_a_tie_that_training_kept_means_both_sides(tmp_path):
    """ensure_weight_tying: one weight was trained, whichever of its names the file has."""
    made = train(tmp_path, save=ALONE, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    dora_convert.merge(made.base, made.adapter, tmp_path / "out")
    assert config_of(tmp_path / "out") == (True, NEW)
    close(says(tmp_path / "out", made.ids), made.logits)


LOST = {case: SAVED[case][0] for case in LORA_ON} | {"saved": {"modules_to_save": ["embed_tokens"]}}


@pytest.mark.parametrize("case", LOST)
def test_an_untied_head_without_its_new_rows_is_an_error(tmp_path, case):
    """Its new rows are in no file, and began as nothing that a file has. PEFT saves no other side of a LoRA, either."""
    save = ALONE if case == "saved" else None
    made = train(tmp_path, tie=False, save=save, **LOST[case])
    with pytest.raises(PlanError) as caught:
        dora_convert.merge(made.base, made.adapter, tmp_path / "out")
    assert all(word in caught.value.text() for word in (HEAD, EMBEDDING, str(OLD), str(NEW)))


LISTS = {"new": [70, 71], "new, and an old one": [5, 71, 70]}


@pytest.mark.parametrize("which", LISTS)
@pytest.mark.parametrize("named", [False, True], ids=["list", "by name"])
@pytest.mark.parametrize("copy", [True, False], ids=["both copies", "one copy"])
def test_trained_rows_hold_every_new_row(tmp_path, which, named, copy):
    """A file without the resized embedding (save_embedding_layers=False, older PEFT): its rows make the new ones."""
    index = LISTS[which]
    config = {"embed_tokens": index} if named else index
    made = train(tmp_path, trainable_token_indices=config, save=ALONE)
    names = [name.removeprefix(PREFIX) for name in load_file(made.file)]
    whole = [name for name in names if name.endswith(".base_layer.weight")]
    made.drop(*{*whole, *(name for name in names if "lm_head" in name and not copy)})
    dora_convert.merge(made.base, made.adapter, tmp_path / "out")
    assert config_of(tmp_path / "out") == (True, NEW)
    close(says(tmp_path / "out", made.ids), made.logits)
    assert dora_convert.verify(made.base, made.adapter, tmp_path / "out").verdict == "agree"


def test_a_new_row_that_no_file_has_is_named(tmp_path):
    """Row 71 was trained and row 70 was not, and the resized embedding is not in the file."""
    made = train(tmp_path, trainable_token_indices=[71], save=ALONE)
    made.drop(*(name.removeprefix(PREFIX) for name in load_file(made.file) if ".base_layer." in name))
    with pytest.raises(PlanError) as caught:
        dora_convert.merge(made.base, made.adapter, tmp_path / "out")
    assert re.search(r"row 70\b.*no file", caught.value.text())
    assert "trained on" not in (caught.value.hint or "")


@pytest.mark.parametrize("rows", [[OLD - 1], [5, 9]])
def test_trained_rows_that_the_base_has(tmp_path, rows):
    """No row is new: tied stays tied, and the vocabulary is the base's."""
    made = train(tmp_path, rows=OLD, trainable_token_indices=rows)
    dora_convert.merge(made.base, made.adapter, tmp_path / "out")
    assert config_of(tmp_path / "out") == (True, OLD)
    close(says(tmp_path / "out", made.ids), made.logits)


def test_unmerge_takes_new_tokens_out_again(tmp_path):
    """The untied head goes, the embedding has its old rows and bytes, and config.json is the base's."""
    made = train(tmp_path, save=ALONE, modules_to_save=["embed_tokens"])
    dora_convert.merge(made.base, made.adapter, tmp_path / "out", undo="exact")
    dora_convert.unmerge(tmp_path / "out", made.adapter, tmp_path / "back")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (made.base / name).read_bytes()


def test_a_tokenizer_with_tokens_that_no_row_is_for(tmp_path):
    """The adapter's tokenizer goes into OUT; where its tokens are beyond the embedding, that is said."""
    made = train(tmp_path, rows=OLD)
    write_json(made.adapter / "added_tokens.json", {"<a>": OLD, "<b>": OLD + 1})
    report = dora_convert.merge(made.base, made.adapter, tmp_path / "out")
    assert any(re.search(rf"token.*\b{OLD + 2}\b.*\b{OLD}\b", text) for text in report.warnings)
    write_json(made.adapter / "added_tokens.json", {"<a>": OLD - 1})
    report = dora_convert.merge(made.base, made.adapter, tmp_path / "again")
    assert not any("token" in text for text in report.warnings)
