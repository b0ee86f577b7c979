"""Merge adapters into a tiny model of every family that transformers has, and compare with PEFT's merge.

    python -m tests.oracles.families                 all families, a row each for docs/models.md
    python -m tests.oracles.families mixtral llava   some model types

Three layouts: names on the Hub, names as transformers 5 saves them, names in the running model. Adapters by PEFT:
LoRA and DoRA with the usual list of modules and with all-linear, LoRA on experts, and LoRA in the disk's own names, as
transformers 4 had them. All factors and magnitudes are random. OUT is loaded by transformers, and each parameter is
compared with PEFT's merge in float32. Logits are compared with base + adapter where text alone makes a forward pass.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto import modeling_auto

import dora_convert

from .. import make_families
from . import explicit, tiny
from .page import ROWS

USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYOUTS = ("hub", "saved", "memory")
LISTS = (*make_families.USUAL, "IMAGE_CLASSIFICATION")
RANK, ALPHA, TOLERANCE = 3, 5, 2e-5
Tensors = Mapping[str, torch.Tensor]


class Row(NamedTuple):
    """The result of one merge."""

    family: str
    model: str
    layout: str
    adapter: str
    result: str  # right | refused | wrong | no adapter | no load
    why: str = ""
    logits: float | None = None
    forward: float | None = None
    """The difference of OUT and the forward pass of base + adapter."""


def chosen(wanted: list[str]) -> dict[str, str]:
    """Return a class for each model type: its usual one with a head, else the bare model."""
    classes = dict(explicit.CLASSES)
    for name in LISTS:
        for kind, entry in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").items():
            classes.setdefault(kind, entry if isinstance(entry, str) else entry[0])
    for kind, entry in modeling_auto.MODEL_MAPPING_NAMES.items():
        classes.setdefault(kind, entry if isinstance(entry, str) else entry[0])
    taken: dict[str, str] = {}
    for kind, name in sorted(classes.items(), key=lambda one: not is_named_after(*one)):
        if name not in taken.values() and (not wanted or kind in wanted):
            taken[kind] = name
    return taken


def is_named_after(kind: str, name: str) -> bool:
    """Return True if a class has its model type's name: other types may use it, too."""
    return name.lower().startswith(re.sub("[^a-z0-9]", "", kind.lower()))


def save(model: PreTrainedModel, layout: str, folder: Path) -> dict[str, torch.Tensor]:
    """Save a model in a layout; return the tensors on disk."""
    own = copy.deepcopy(model)
    if layout == "hub":
        own._weight_conversions = get_model_conversion_mapping(own, add_legacy=False)
    own.save_pretrained(folder, save_original_format=layout != "memory")
    if model.config.model_type == "qwen2_5_omni":
        torch.save({}, folder / "spk_dict.pt")
    return load_file(folder / "model.safetensors")


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose tied weights are copies: PEFT merges in place, into both sides of a tie."""
    own = copy.deepcopy(model)
    for name in getattr(own, "all_tied_weights_keys", {}):
        owner, _, leaf = name.rpartition(".")
        module = own.get_submodule(owner)
        setattr(module, leaf, torch.nn.Parameter(getattr(module, leaf).detach().clone()))
    return own


def randomised(adapted: Any) -> Any:
    """Give every factor and magnitude of an adapter random values."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.2)
    return adapted


def adapters(model: PreTrainedModel) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the adapters that a model may have, with the fields of their configs."""
    leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if usual := [name for name in USUAL if name in leaves]:
        whole = USUAL if {"q_proj", "gate_proj"} <= leaves else usual
        yield "list", {"target_modules": whole}
        yield "list, DoRA", {"target_modules": whole, "use_dora": True}
    yield "all-linear", {"target_modules": "all-linear"}
    yield "all-linear, DoRA", {"target_modules": "all-linear", "use_dora": True}
    if isinstance(getattr(model, "classifier", None), torch.nn.Linear):
        yield from with_classifier(leaves)
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head and isinstance(head, torch.nn.Linear)]
    if heads:
        yield "head", {"target_modules": heads}
    experts = {
        name.rpartition(".")[2] for name, value in model.named_parameters() if value.ndim == 3 and "expert" in name
    }
    experts = {name for name in experts if "bias" not in name}
    if experts:
        yield "experts", {"target_modules": [], "target_parameters": sorted(experts)}


def with_classifier(leaves: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield adapters on queries and values with a trained classifier, as recipes for images have them."""
    pairs = [pair for pair in (("q_proj", "v_proj"), ("query", "value")) if {*pair} <= {*leaves}]
    if pairs:
        fields = {"target_modules": list(pairs[0]), "modules_to_save": ["classifier"]}
        yield "classifier", fields
        yield "classifier, DoRA", {**fields, "use_dora": True}


def logits(model: Any) -> torch.Tensor | str:
    """Return a model's answer to a text; the reason if text is not enough."""
    ids = torch.arange(5, 17).reshape(2, 6)
    torch.manual_seed(7)
    try:
        with torch.no_grad():
            encoder = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
            return model(input_ids=ids, use_cache=False, **encoder)[0].float()
    except Exception as error:  # noqa: BLE001 # any family's own
        return f"{type(error).__name__}: {error}"


def difference(ours: Tensors, theirs: Tensors) -> tuple[float, str]:
    """Return the greatest difference of two state dicts, and the name of its parameter."""
    worst, where = 0.0, ""
    for name, value in theirs.items():
        if not value.dtype.is_floating_point:
            continue
        if name not in ours or ours[name].shape != value.shape:
            return float("inf"), name
        apart = (ours[name].double() - value.double()).abs().max().item() if value.numel() else 0.0
        if not apart <= worst:
            worst, where = apart, name
    return worst, where


def merged(base: Path, adapter: Path, folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """Merge with our program and load OUT."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    dora_convert.merge(str(base), [str(adapter)], str(out))
    return type(model).from_pretrained(out, dtype=torch.float32).eval()


def try_family(family: str, name: str, folder: Path) -> Iterator[Row]:
    """Yield a row for each merge of a family."""
    model = tiny.tiny(name)
    if isinstance(model, str):
        yield Row(family, name, "", "", "no model", model)
        return
    try:
        disk = {layout: save(model, layout, folder / layout) for layout in LAYOUTS}
        loaded = {layout: type(model).from_pretrained(folder / layout, dtype=torch.float32) for layout in disk}
    except Exception as error:  # noqa: BLE001 # any family's own
        yield Row(family, name, "", "", "no model", f"{type(error).__name__}: {error}"[:200])
        return
    for layout, copied in loaded.items():
        if difference(copied.state_dict(), model.state_dict())[0] > 0:
            yield Row(family, name, layout, "", "no model", "transformers does not load what it saved")
            del disk[layout]
    layouts = [each for k, each in enumerate(disk) if all(disk[each].keys() != disk[o].keys() for o in list(disk)[:k])]
    for kind, fields in adapters(model):
        adapter = folder / f"adapter {kind}"
        try:
            config = LoraConfig(r=RANK, lora_alpha=ALPHA, **fields)
            adapted = randomised(get_peft_model(untied(model), config)).eval()
            adapted.save_pretrained(adapter)
            answer = logits(adapted)
            truth = adapted.merge_and_unload()
        except Exception as error:  # noqa: BLE001 # any family's own
            yield Row(family, name, "", kind, "no adapter", f"{type(error).__name__}: {error}"[:200])
            continue
        for layout in layouts:
            row = Row(family, name, layout, kind, "")
            yield compare(row, folder, adapter, model, truth, None if isinstance(answer, str) else answer)
    yield from try_disk_names(family, name, folder, model, disk)


def compare(
    row: Row,
    folder: Path,
    adapter: Path,
    model: PreTrainedModel,
    truth: PreTrainedModel,
    adapted: torch.Tensor | None = None,
) -> Row:
    """Merge with our program; compare with a merged model, and with the answer of base + adapter."""
    try:
        ours = merged(folder / row.layout, adapter, folder, model)
    except dora_convert.DoraConvertError as error:
        faults = {
            re.sub(r"\d+", "*", str(getattr(fault, "why", fault))): fault for fault in getattr(error, "faults", ())
        }
        return row._replace(result="refused", why=f"{error} | {' | '.join(map(str, list(faults.values())[:2]))}"[:600])
    except Exception as error:  # noqa: BLE001 # transformers' own
        return row._replace(result="no load", why=f"{type(error).__name__}: {error}"[:300])
    worst, where = difference(ours.state_dict(), truth.state_dict())
    answer, own = logits(ours), logits(truth)
    others = [] if isinstance(answer, str) else [each for each in (own, adapted) if isinstance(each, torch.Tensor)]
    apart = min(((answer - other).abs().max().item() for other in others), default=None)
    forward = None
    if isinstance(answer, torch.Tensor) and adapted is not None:
        forward = (answer - adapted).abs().max().item()
    right = worst <= TOLERANCE and (apart is None or apart <= 100 * TOLERANCE)
    why = "" if right else f"{where}: {worst:.3g}"
    return row._replace(result="right" if right else "wrong", why=why, logits=apart, forward=forward)


def try_disk_names(
    family: str, name: str, folder: Path, model: PreTrainedModel, disk: Mapping[str, Tensors]
) -> Iterator[Row]:
    """Yield a row for each layout with an adapter in the names of the Hub's layout, as transformers 4 made them."""
    words = (*USUAL, "w1", "w2", "w3", "query", "key", "value", "dense", "fc0", "fc1", "fc2", "qkv", "proj", "linear_1")
    modules = [
        key.removesuffix(".weight")
        for key, value in disk.get("hub", {}).items()
        if value.ndim == 2 and key.removesuffix(".weight").rpartition(".")[2] in words and key.endswith(".weight")
    ]
    if not modules:
        return
    adapter, torch_seed = folder / "adapter disk", 5
    torch.manual_seed(torch_seed)
    changed, factors = dict(disk["hub"]), {}
    for module in modules:
        weight = changed[f"{module}.weight"]
        A, B = 0.2 * torch.randn(RANK, weight.shape[1]), 0.2 * torch.randn(weight.shape[0], RANK)
        changed[f"{module}.weight"] = (weight.double() + ALPHA / RANK * B.double() @ A.double()).float()
        factors |= {f"base_model.model.{module}.lora_{k}.weight": value for k, value in (("A", A), ("B", B))}
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(set(modules))}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "hub", folder / "truth")
    save_file(changed, folder / "truth" / "model.safetensors", {"format": "pt"})
    try:
        truth = type(model).from_pretrained(folder / "truth", dtype=torch.float32).eval()
    except Exception as error:  # noqa: BLE001 # transformers' own
        yield Row(family, name, "", "disk's names", "no load", f"{type(error).__name__}: {error}"[:300])
        return
    for layout in disk:
        if layout == "hub" or disk[layout].keys() != disk["hub"].keys():
            yield compare(Row(family, name, layout, "disk's names", ""), folder, adapter, model, truth)


def main() -> int:
    """Run all families or some; write a row of JSON for each merge."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    wanted = [word for word in sys.argv[1:] if not word.startswith("-")]
    results: Counter[str] = Counter()
    ROWS.parent.mkdir(exist_ok=True)
    with ROWS.open("w", encoding="utf-8") as file:
        for family, name in chosen(wanted).items():
            with tempfile.TemporaryDirectory() as folder:
                for row in try_family(family, name, Path(folder)):
                    file.write(json.dumps(row._asdict()) + "\n")
                    results[row.result] += 1
            file.flush()
    sys.stdout.write(f"{dict(results)}\n")
    return int(bool(results["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
