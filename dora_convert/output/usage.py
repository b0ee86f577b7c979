"""Show in a model card how the model is loaded: code that runs as it stands, or none.

OUT stands for the folder of the card, and BASE for a base whose repo is not known.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any

from ..naming.families import PIPELINES

PIPELINE: Mapping[str, str] = {"_class_name": "DiffusionPipeline"}
"""The config of a pipeline of diffusers as far as a card needs it: this class finds the pipeline's own."""


def loading_code(
    library: str | None, config: Mapping[str, Any], *, adapter: bool, base: str | None, task: str | None
) -> list[str]:
    """Return the lines of Python that load a model, or an adapter onto its base; none if they are not known.

    `config` is that of the model, or of the adapter's base. `task` is the class of the model, or the end of its
    name, as an adapter tells it.
    """
    match library, adapter:
        case "transformers", False if config.get("model_type"):
            auto = auto_class(config, task) or "AutoModel"
            return [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("OUT", dtype="auto")']
        case "peft", True if known := auto_class(config, task):
            return [
                *("from peft import PeftModel", f"from transformers import {known}", ""),
                f'model = {known}.from_pretrained("{base or "BASE"}", dtype="auto")',
                'model = PeftModel.from_pretrained(model, "OUT")',
            ]
        case "diffusers", _ if name := _diffusers_class(config):
            if not adapter:
                return [f"from diffusers import {name}", "", f'model = {name}.from_pretrained("OUT")']
            if name == PIPELINE["_class_name"]:
                return [
                    *(f"from diffusers import {name}", ""),
                    f'pipeline = {name}.from_pretrained("{base or "BASE"}")',
                    'pipeline.load_lora_weights("OUT")',
                ]
    return []


def auto_class(config: Mapping[str, Any], task: str | None = None) -> str | None:
    """Return the class of transformers that loads a model, from its architecture or its adapter's task."""
    for name in (*architectures(config), task or ""):
        for end in PIPELINES:
            if name.endswith(end):
                return "AutoModel" + end.replace("LMHeadModel", "ForCausalLM")
    return None


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the classes that a config names."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _diffusers_class(config: Mapping[str, Any]) -> str | None:
    """Return the class of diffusers that loads a model or a pipeline."""
    name = config.get("_class_name")
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        return None
    return PIPELINE["_class_name"] if name.endswith("Pipeline") else name


def library_of(config: Mapping[str, Any] | None) -> str | None:
    """Return the library that loads a model, from its config."""
    if not config:
        return None
    return "diffusers" if config.keys() & {"_class_name", "_diffusers_version"} else "transformers"
