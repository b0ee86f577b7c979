"""The code in model cards: it runs as it stands, or a card has none."""

from __future__ import annotations

import ast
import re
from importlib import import_module

import pytest
import torch
from safetensors.torch import save_file

import dora_convert
from dora_convert.output.usage import loading_code

from .toy import make_adapter, write_json

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
UNET = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.35.0"}
DIFFUSERS = ("DiffusionPipeline", "UNet2DConditionModel", "FluxTransformer2DModel")
"""Classes of diffusers, which the tests do not install."""


def code_of(text: str) -> str | None:
    """The code of a card, after a look at every name in it."""
    found = re.findall(r"(?ms)^```python\n(.*?)^```$", text)
    assert len(found) < 2
    for source in found:
        known = {"torch"}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names]
                assert node.module in ("transformers", "peft", "diffusers")
                for name in names:
                    assert (
                        name in DIFFUSERS if node.module == "diffusers" else hasattr(import_module(node.module), name)
                    )
                known |= {*names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
        used = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert used <= known, source
        assert "None" not in source
    return found[0] if found else None


def card_of(folder):
    return (folder / "README.md").read_text()


CASES = {
    "a model": ("transformers", LLAMA, False, None, "AutoModelForCausalLM"),
    "a model of another class": ("transformers", {"model_type": "clip", "architectures": ["CLIPModel"]}, False, None, "AutoModel."),
    "a config without model_type": ("transformers", {"hidden_size": 8}, False, None, None),
    "no config": (None, {}, False, None, None),
    "architectures of no sense": ("transformers", {"model_type": "llama", "architectures": 3}, False, None, "AutoModel."),
    "an adapter": ("peft", LLAMA, True, None, "PeftModel"),
    "an adapter that tells its task": ("peft", {}, True, "ForSequenceClassification", "AutoModelForSequenceClassification"),
    "an adapter of an unknown class": ("peft", {"model_type": "llama"}, True, None, None),
    "a whole model with factors": ("transformers", LLAMA, True, None, None),
    "a component": ("diffusers", UNET, False, None, "UNet2DConditionModel.from_pretrained"),
    "an adapter of a component": ("diffusers", UNET, True, None, None),
    "a pipeline": ("diffusers", {"_class_name": "FluxPipeline"}, False, None, "DiffusionPipeline"),
    "an adapter of a pipeline": ("diffusers", {"_class_name": "FluxPipeline"}, True, None, "load_lora_weights"),
    "a diffusion model of no class": ("diffusers", {"_diffusers_version": "0.35.0"}, False, None, None),
    "a class of no sense": ("diffusers", {"_class_name": ["a", "b"]}, False, None, None),
    "a class that is a word of Python": ("diffusers", {"_class_name": "class"}, False, None, None),
    "a tool without code here": ("mlx", LLAMA, True, None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", [None, "org/base"])
def test_every_branch(case, base):
    """Each library, for models and adapters, with configs that tell all or nothing."""
    library, config, adapter, task, wanted = CASES[case]
    lines = loading_code(library, config, adapter=adapter, base=base, task=task)
    code = code_of("\n".join(["```python", *lines, "```", ""])) if lines else None
    assert (wanted in code) if wanted else not code
    if adapter and code:
        assert f'"{base or "BASE"}"' in code


@pytest.mark.parametrize("to", ["peft", "kohya", "diffusers", "mlx"])
@pytest.mark.parametrize("known", [True, False])
def test_converted(tmp_path, base, to, known):
    """An adapter of a language model, with its base and without, in every format."""
    adapter = make_adapter(tmp_path / "adapter", base, dora=False, base_model_name_or_path="/home/me/base")
    dora_convert.convert(adapter, tmp_path / "out", to=to, **({"base": base.path} if known else {}))
    text = card_of(tmp_path / "out")
    code = code_of(text)
    assert ("PeftModel" in code) if to == "peft" else code is None
    assert "library_name: diffusers" not in text or not known
    assert "/home/me" not in text
    assert "A LoRA adapter for base." in text


def pipeline(folder):
    """A pipeline of diffusers with one projection."""
    (folder / "unet").mkdir(parents=True)
    write_json(
        folder / "model_index.json",
        {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", UNET["_class_name"]]},
    )
    write_json(folder / "unet/config.json", UNET)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{name}.weight": torch.randn(16, 24)}, folder / "unet/diffusion_pytorch_model.safetensors")
    lora = {f"unet.{name}.lora_A.weight": torch.randn(2, 24), f"unet.{name}.lora_B.weight": torch.randn(16, 2)}
    (folder.parent / "style").mkdir()
    save_file(lora, folder.parent / "style/pytorch_lora_weights.safetensors")
    return folder, folder.parent / "style"


def test_a_pipeline(tmp_path):
    """Its merge, and an adapter for it."""
    base, lora = pipeline(tmp_path / "sd")
    dora_convert.merge(base, lora, tmp_path / "out")
    assert 'DiffusionPipeline.from_pretrained("OUT")' in code_of(card_of(tmp_path / "out"))
    dora_convert.convert(lora, tmp_path / "kohya", to="kohya", base=base, base_model="org/sd")
    code = code_of(card_of(tmp_path / "kohya"))
    assert 'DiffusionPipeline.from_pretrained("org/sd")' in code
    assert 'load_lora_weights("OUT")' in code


def test_a_component(tmp_path, base, adapter):
    """A lone transformer or UNet of diffusers."""
    write_json(base.path / "config.json", UNET)
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert "UNet2DConditionModel.from_pretrained" in code_of(card_of(tmp_path / "out"))
