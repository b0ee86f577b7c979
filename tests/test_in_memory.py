"""iter_merged and merge_state_dict give the bits of a merge's files, in their order, without the files."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dora_convert
from dora_convert import NumericalError, UsageError

from .toy import make_adapter, make_base


def files(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return True for the same dtype, shape and bytes."""
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and one.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "float32", "workers": 1, "max_memory": "8MiB"}, {"exclude": "q_proj"}]
)
def test_the_bits_and_the_order_of_a_merge(tmp_path, base, adapter, options):
    """For a DoRA: what is written, in the order of the shards' headers; torch keeps its threads."""
    dora_convert.merge(base.path, adapter, tmp_path / "out", **options)
    threads = torch.get_num_threads()
    found = []
    for name, tensor in dora_convert.iter_merged(base.path, adapter, **options):
        assert torch.get_num_threads() == threads
        found.append((name, tensor.clone()))
    written = files(tmp_path / "out")
    assert {name for name, _ in found} == set(written)
    assert all(same(tensor, written[name]) for name, tensor in found)
    order = [
        name
        for path in sorted((tmp_path / "out").glob("*.safetensors"))
        for name in safe_open(path, "pt").offset_keys()
    ]
    assert [name for name, _ in found] == order


def test_several_adapters_and_weights(tmp_path, base, adapter):
    """A LoRA and a DoRA, with strengths; in memory, too."""
    both = [adapter, make_adapter(tmp_path / "lora", base, dora=False, seed=7)]
    dora_convert.merge(base.path, both, tmp_path / "out", weight=[0.5, 2])
    written = files(tmp_path / "out")
    assert all(
        same(tensor, written[name]) for name, tensor in dora_convert.iter_merged(base.path, both, weight=[0.5, 2])
    )
    given = files(base.path)
    merged = dora_convert.merge_state_dict(given, both, weight=[0.5, 2])
    assert merged.keys() == written.keys()
    assert all(same(merged[name], written[name]) for name in written)


def test_the_callers_tensors_stay(base, adapter):
    """Untouched tensors are the same objects, and the input keeps its bytes; views need not be contiguous."""
    given = {name: value.T.contiguous().T if value.dim() == 2 else value for name, value in files(base.path).items()}
    before = {name: value.clone() for name, value in given.items()}
    merged = dora_convert.merge_state_dict(given, adapter)
    assert all(same(given[name], before[name]) for name in given)
    changed = {name for name in given if merged[name] is not given[name]}
    assert changed
    assert all("proj" in name for name in changed)


def test_a_model_is_its_state_dict(tmp_path):
    """A transformers model with tied weights; the result loads, and computes what PEFT merges."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**small, tie_word_embeddings=True)).eval()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match="holds an adapter already"):
        dora_convert.merge_state_dict(wrapped, tmp_path / "adapter")
    tokens = torch.arange(12).view(1, -1)
    with torch.no_grad():
        expected = wrapped(tokens).logits
    plain = wrapped.unload()
    plain.load_state_dict(dora_convert.merge_state_dict(plain, tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_model_is_never_held(tmp_path):
    """With a budget of one tensor, no tensor is alive but the one in the consumer's hands."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    alive: list[weakref.ref[torch.Tensor]] = []
    for _, tensor in dora_convert.iter_merged(base.path, adapter, max_memory="1MiB"):
        alive.append(weakref.ref(tensor))
        gc.collect()
        held = sum(ref().nbytes for ref in alive if ref() is not None)
        assert held <= 1 << 20


def test_faults_come_at_once_or_at_their_tensor(tmp_path, base):
    """Options and headers are checked by the call; an overflow is raised by the iteration, in Python's words."""
    adapter = make_adapter(tmp_path / "adapter", base, dora=False)
    with pytest.raises(UsageError, match="device='gpu'"):
        dora_convert.iter_merged(base.path, adapter, device="gpu")
    with pytest.raises(UsageError, match="No ADAPTER"):
        dora_convert.iter_merged(base.path, [])
    with pytest.raises(UsageError, match="neither a mapping"):
        dora_convert.merge_state_dict(base.path, adapter)
    tensors = {
        name: torch.full_like(value, 1e38) if "up_proj" in name else value for name, value in files(base.path).items()
    }
    (tmp_path / "huge").mkdir()
    save_file(tensors, tmp_path / "huge/model.safetensors", {"format": "pt"})
    (tmp_path / "huge/config.json").write_text((base.path / "config.json").read_text())
    merged = dora_convert.iter_merged(tmp_path / "huge", adapter, dtype="float16")
    with pytest.raises(NumericalError, match="overflows") as caught:
        list(merged)
    assert "dtype='bfloat16'" in caught.value.hint
