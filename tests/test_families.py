"""Names of the running model: the table of families, against transformers itself."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from dora_convert.naming.family_map import FamilyMap
from dora_convert.naming.missing import explain_missing
from dora_convert.naming.resolve import NameResolver, TableOnDemand, find_tie
from dora_convert.naming.slots import Slot
from dora_convert.naming.table import family_of, read_table
from dora_convert.plan.explain import warn_of_past_lora
from dora_convert.storage.checkpoint import open_checkpoint
from dora_convert.storage.refs import Source

from . import make_families
from .oracles.tiny import tiny
from .toy import make_base

SAMPLE = ("mixtral", "llava", "qwen2_vl", "dinov2", "bailing_hybrid", "ernie4_5_moe")
CLASSES = (
    "MixtralForCausalLM", "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "ViTForImageClassification",
    "BailingHybridForCausalLM", "GraniteMoeForCausalLM", "GPTNeoXForCausalLM",
    "DetrForObjectDetection",
)  # fmt: skip


def headers(tensors: dict[str, torch.Tensor]) -> dict[str, SimpleNamespace]:
    """Return stand-ins for stored tensors."""
    return {name: SimpleNamespace(name=name, shape=tuple(value.shape)) for name, value in tensors.items()}


def test_the_table_is_what_transformers_says():
    """The rules, and the classes of some families, are those of the installed transformers."""
    written = read_table()
    table, facts = make_families.make(SAMPLE)
    again = json.loads(json.dumps(table))
    assert written["transformers"] == again["transformers"], "run python -m tests.make_families"
    assert written["rules"] == again["rules"]
    assert {name: written["models"].get(name) for name in again["models"]} == again["models"]
    assert list(make_families.contradictions(facts)) == []


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("layout", ["hub", "saved", "memory"])
def test_names_are_the_loaders(name, layout):
    """Every stored name leads to the weight that transformers' loader gives it to."""
    model = tiny(name)
    names = model.state_dict()
    if layout == "hub":
        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    disk = dict(names) if layout == "memory" else revert_weight_conversion(model, dict(names))
    config = {**model.config.to_dict(), "architectures": [name]}
    found = FamilyMap(headers(disk), family_of(config), config)
    transforms = get_model_conversion_mapping(model)
    renames = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    for key in sorted(disk, key=dot_natural_key):
        wanted, _ = rename_source_key(key, renames, converters, model.base_model_prefix, names)
        assert found.running(key) == (wanted if wanted in names or key not in names else key)
    assert all(found.stored(weight) for weight in names)


def test_experts_are_stacked_in_natural_order():
    """Expert 10 comes after expert 9; gate and up are the halves of one weight."""
    names = [f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(12) for p in ("gate", "up", "down")]
    disk = {name: torch.zeros((6, 4) if "down" in name else (3, 8)) for name in names}
    config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    found = FamilyMap(headers(disk), family_of(config), config)
    gate_up = found.stored("model.layers.0.mlp.experts.gate_up_proj")
    assert gate_up[10] == Slot(names[30], (0, 3), expert=10, experts=12)
    assert gate_up[12] == Slot(names[1], (3, 6), expert=0, experts=12)
    assert found.stored(names[4]) == (Slot(names[4]),)
    del disk[names[0]]
    broken = FamilyMap(headers(disk), family_of(config), config)
    assert broken.stored("model.layers.0.mlp.experts.gate_up_proj") is None
    assert "does not have each of them once" in broken.refusal("model.layers.0.mlp.experts.gate_up_proj")


def test_names_of_one_expert_lead_into_a_stack():
    """An adapter of transformers 4 finds its expert in a base that stores all experts as one tensor."""
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    found = FamilyMap(headers({stack: torch.zeros(4, 6, 8)}), family_of(config), config)
    assert found.stored("model.layers.0.block_sparse_moe.experts.2.w3.weight") == (Slot(stack, part=(15, 18)),)
    assert found.stored("model.layers.0.block_sparse_moe.experts.4.w3.weight") is None


def test_a_hundred_thousand_names_are_quick():
    """Names of 100,000 tensors and 45,000 targets are found in linear time."""
    config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    shape = SimpleNamespace(shape=(4, 4))
    names = [f"model.layers.{k}.mlp.experts.{e}.{p}_proj.weight" for k in range(130) for e in range(256)
             for p in ("gate", "up", "down")]  # fmt: skip
    start = time.process_time()
    found = FamilyMap(dict.fromkeys(names, shape), family_of(config), config)
    resolver = NameResolver(found._tensors, names[:45_000], found)
    assert all(resolver.slots(name) for name in names[:45_000])
    assert len(resolver.slots("model.layers.7.mlp.experts.down_proj")) == 256
    assert time.process_time() - start < 3


def test_plain_names_read_no_table(tmp_path, monkeypatch):
    """An adapter whose names the base has is resolved without the table."""
    monkeypatch.setattr(TableOnDemand, "families", property(lambda _: pytest.fail("the table was read")))
    base = open_checkpoint(Source(make_base(tmp_path / "base").path, "base"))
    names = NameResolver(base.tensors, list(base.tensors), TableOnDemand(base))
    assert all(names.stored(name) for name in base.tensors)


def test_own_code_is_said(tmp_path):
    """For a model with its own code, the error says what was tried."""
    path = make_base(tmp_path / "base").path
    config = json.loads((path / "config.json").read_text())
    own = {**config, "architectures": ["MyModel"], "model_type": "mine", "auto_map": {"AutoModel": "mine.MyModel"}}
    (path / "config.json").write_text(json.dumps(own))
    base = open_checkpoint(Source(path, "base"))
    names = NameResolver(base.tensors, ["model.encoder.block.weight"], TableOnDemand(base))
    why = explain_missing("model.encoder.block.weight", names, base)
    assert why.startswith("no such module by its own name or with one prefix (the model has its own code); closest:")


@pytest.mark.parametrize(
    ("kind", "head"), [("modernbert", "decoder"), ("t5gemma", "lm_head.out_proj"), ("llama", "lm_head")]
)
def test_the_head_that_is_not_stored_has_the_familys_name(tmp_path, kind, head):
    """A tied head that is not on disk is called as the model calls it."""
    base = make_base(tmp_path / "base")
    config = {"architectures": ["XForCausalLM"], "model_type": kind, "tie_word_embeddings": True}
    (base.path / "config.json").write_text(json.dumps(config))
    tree = open_checkpoint(Source(base.path, "base"))
    bare = {name for name in tree.tensors if not name.startswith("lm_head")}
    shards = tuple(
        type(shard)(shard.filename, shard.metadata, tuple(each for each in shard.tensors if each.name in bare))
        for shard in tree.shards
    )
    tie = find_tie(type(tree)(tree.source, shards, tree.index_name, config))
    assert tie.head == f"{head}.weight"


def test_a_weight_that_is_read_past_its_lora_is_warned_of():
    """The merge says which layers training could not change."""
    base = SimpleNamespace(model_types=frozenset({"jamba"}))
    names = ("model.layers.0.mamba.dt_proj.weight", "model.layers.0.mamba.in_proj.weight")
    items = {name: SimpleNamespace(edits=(1,)) for name in names}
    (warning,) = warn_of_past_lora(base, items)
    assert "jamba reads the weights of model.layers.0.mamba.dt_proj past their LoRA" in warning
    assert "in_proj" not in warning
