"""MergeCallback merges what a Trainer has trained: from its last checkpoint, or saved by the callback."""

from __future__ import annotations

import pytest
import torch

from dora_convert import UsageError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from dora_convert.integrations.trainer import MergeCallback  # noqa: E402

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}


def trainer(folder, model, callback, save):
    """A training of two steps."""
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 2
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "run"), max_steps=2, per_device_train_batch_size=1, save_strategy=save, report_to=[],
        disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback])


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
@pytest.mark.parametrize("save", ["no", "steps"])
def test_the_trained_adapter_is_merged(tmp_path, save):
    """The merged model computes what the trained one does."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    callback = MergeCallback(dtype="float32")
    run = trainer(tmp_path, wrapped, callback, save)
    run.train()
    assert callback.report.verified.wrong_elements == 0
    assert callback.report.adapters == (str(tmp_path / "run" / ("adapter" if save == "no" else "checkpoint-2")),)
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "run/merged")
    tokens = torch.arange(6).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, wrapped.eval()(tokens).logits, rtol=1e-4, atol=1e-5)
        assert not torch.equal(merged(tokens).logits, wrapped.unload()(tokens).logits)


def test_a_model_without_an_adapter_is_refused(tmp_path):
    """Nothing was trained that could be merged."""
    state = transformers.TrainerState(global_step=1)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(UsageError, match="has no adapter"):
        MergeCallback().on_train_end(arguments, state, transformers.TrainerControl(), model=torch.nn.Linear(2, 2))
