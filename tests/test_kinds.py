"""Parts that PEFT's own tests do not reach: the record, the self-check and the errors of every kind of update."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import dora_convert
from dora_convert.errors import PlanError

from .toy import HIDDEN, VOCABULARY, edit_json, load, make_adapter, make_base, rounded, write_shards

EMBEDDING = "model.embed_tokens.weight"
E, D1, D2, RANK = 3, 20, 12, 4


@pytest.fixture
def tied(tmp_path):
    """A base whose head is its embedding."""
    base = make_base(tmp_path / "tied")
    del base.tensors["lm_head.weight"]
    write_shards(base.path, base.tensors, 2)
    edit_json(base.path / "config.json", tie_word_embeddings=True, vocab_size=VOCABULARY)
    return base


def tokens(tmp_path, base, rows, name="tokens", **config):
    """An adapter that trains some rows of the embedding, and one linear layer."""
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    config = {"trainable_token_indices": rows} | config
    extra = {key: torch.randn(len(rows), HIDDEN)}
    return make_adapter(tmp_path / name, base, dora=False, targets=("k_proj",), extra=extra, **config)


def test_trained_rows(tmp_path, base):
    """Set as they are, and the base's own rows kept in the record."""
    adapter = tokens(tmp_path, base, [5, 71, 0])
    value = load_file(adapter / "adapter_model.safetensors")
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    want = base.tensors[EMBEDDING].clone()
    want[[5, 71, 0]] = value["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"].bfloat16()
    assert torch.equal(load(tmp_path / "out")[EMBEDDING], want)
    record = load_file(tmp_path / "out/dora_convert/undo.safetensors")
    assert record[f"index/{EMBEDDING}"].tolist() == [0, 5, 71]
    assert torch.equal(record[f"rows/{EMBEDDING}"], base.tensors[EMBEDDING][[0, 5, 71]])


def test_rows_of_two_adapters(tmp_path, base):
    """Different rows go together; the same row twice, and a row at half strength, are errors."""
    first, second = tokens(tmp_path, base, [1, 2], "first"), tokens(tmp_path, base, [3], "second")
    dora_convert.merge(base.path, [first, second], tmp_path / "out")
    with pytest.raises(PlanError) as caught:
        dora_convert.merge(base.path, [first, tokens(tmp_path, base, [2], "third")], tmp_path / "again")
    assert "row 2" in caught.value.text()
    with pytest.raises(PlanError) as caught:
        dora_convert.merge(base.path, first, tmp_path / "again", weight=[0.5])
    assert "no weight of 0.5" in caught.value.text()


@pytest.mark.parametrize("rows", [[1, VOCABULARY], [1, 1]])
def test_rows_that_are_not_there(tmp_path, base, rows):
    """Beyond the vocabulary, or named twice."""
    with pytest.raises(PlanError):
        dora_convert.merge(base.path, tokens(tmp_path, base, rows), tmp_path / "out")


def head(rank=4):
    """LoRA on the output head."""
    return {
        "base_model.model.lm_head.lora_A.weight": torch.randn(rank, HIDDEN),
        "base_model.model.lm_head.lora_B.weight": torch.randn(VOCABULARY, rank),
    }


def test_a_tie_that_an_adapter_ends(tmp_path, tied):
    """The head is added beside the embedding it was; receipt and counts say so."""
    adapter = make_adapter(tmp_path / "head", tied, dora=False, extra=head())
    report = dora_convert.merge(tied.path, adapter, tmp_path / "out")
    assert report.tensors["added"] == 1
    assert report.verified.wrong_elements == 0
    merged = load(tmp_path / "out")
    assert torch.equal(merged[EMBEDDING], tied.tensors[EMBEDDING])
    value = load_file(adapter / "adapter_model.safetensors")
    delta = 1.5 * (
        value["base_model.model.lm_head.lora_B.weight"].double()
        @ value["base_model.model.lm_head.lora_A.weight"].double()
    )
    assert torch.equal(merged["lm_head.weight"], rounded(tied.tensors[EMBEDDING] + delta, torch.bfloat16))
    receipt = json.loads((tmp_path / "out/dora_convert/receipt.json").read_text())
    assert receipt["tensors"]["lm_head.weight"]["of"] == EMBEDDING
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert index["lm_head.weight"] == index[EMBEDDING]
    assert (tmp_path / "out/config.json").read_text() != (tied.path / "config.json").read_text()


def test_rows_keep_a_tie(tmp_path, tied):
    """New tokens are read and predicted by the same weight."""
    dora_convert.merge(tied.path, tokens(tmp_path, tied, [4]), tmp_path / "out")
    assert "lm_head.weight" not in load(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_an_adapter_that_keeps_a_tie_beside_one_that_ends_it(tmp_path, tied):
    """An update of both sides changes both, and an update of one side changes that side."""
    both = tokens(tmp_path, tied, [4])
    dora_convert.merge(
        tied.path, [both, make_adapter(tmp_path / "h", tied, dora=False, extra=head())], tmp_path / "out"
    )
    merged = load(tmp_path / "out")
    assert not torch.equal(merged[EMBEDDING][4], tied.tensors[EMBEDDING][4])
    assert torch.equal(merged[EMBEDDING][5], tied.tensors[EMBEDDING][5])
    assert not torch.equal(merged["lm_head.weight"][5], tied.tensors[EMBEDDING][5])


def test_scaled_ties_are_refused(tmp_path, tied):
    """T5 divides by √d where the head is tied: untying would change more than weights."""
    edit_json(tied.path / "config.json", model_type="t5")
    adapter = make_adapter(tmp_path / "head", tied, dora=False, extra=head())
    with pytest.raises(PlanError) as caught:
        dora_convert.merge(tied.path, adapter, tmp_path / "out")
    assert "tied to more than the output head" in caught.value.text()


@pytest.mark.parametrize("rows", [VOCABULARY + 9, VOCABULARY - 9])
def test_another_vocabulary(tmp_path, tied, rows):
    """More tokens or fewer: the config follows, and the record keeps what the output has no place for."""
    value = torch.randn(rows, HIDDEN).bfloat16()
    kept = min(rows, VOCABULARY) - 3
    value[:kept] = tied.tensors[EMBEDDING][:kept]
    extra = {"base_model.model.model.embed_tokens.weight": value}
    adapter = make_adapter(tmp_path / "grown", tied, dora=False, targets=("k_proj",), extra=extra)
    dora_convert.merge(tied.path, adapter, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")[EMBEDDING], value)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == rows
    record = load_file(tmp_path / "out/dora_convert/undo.safetensors")
    assert record[f"index/{EMBEDDING}"].tolist() == list(range(kept, VOCABULARY))
    assert torch.equal(record[f"rows/{EMBEDDING}"], tied.tensors[EMBEDDING][kept:])


def test_a_vocabulary_of_one_side(tmp_path, base):
    """An embedding that grew and a head that did not make no model."""
    extra = {"base_model.model.model.embed_tokens.weight": torch.randn(VOCABULARY + 1, HIDDEN)}
    adapter = make_adapter(tmp_path / "grown", base, dora=False, extra=extra)
    with pytest.raises(PlanError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert "must bring both" in caught.value.text()
