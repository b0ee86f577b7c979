r"""Read PEFT's adapter folders: `adapter_config.json` beside `adapter_model.safetensors` (or `.bin`).

Tensor names are `base_model.model.<module>` and a suffix, shapes for a weight of (out, in):

    .lora_A.weight  (r, in)      .lora_B.weight  (out, r)      Linear, GPT-2's Conv1D, MultiheadAttention
    .lora_A.weight  (r, in, *k)  .lora_B.weight  (out, r, 1…)  convolutions
    .lora_A.weight  (E·r, in)    .lora_B.weight  (out, r·E)    `target_parameters` on E experts
    .lora_A  (r, in)  .lora_B  (out, r)  .lora_E  (r, 1)       AdaLoRA
    .lora_embedding_A  (r, rows) .lora_embedding_B  (dim, r)   embeddings, whose weight is (rows, dim)
    .lora_magnitude_vector       (out), (dim) or (1, out, 1…)  DoRA; some versions append `.weight`
    .lora_B.bias (out)  .lora_diag (r)                         `lora_bias`; KaSA
    .token_adapter.trainable_tokens_delta  (n, dim)            new rows, in spite of the name
    .base_layer.weight  .base_layer.bias                       the base's own tensor, saved beside its adapter
    <module>.<key>                                             `modules_to_save` and `bias`, absolute values

The scaling is alpha/r, or alpha/√r with `use_rslora`. `rank_pattern` and `alpha_pattern` may change r and
alpha for a module: the first key in the order of the file that matches `(.*\.)?(key)$` counts.

Adapters that are not LoRA have tensors of their own: see `kinds`. Everything else that a config can say is
refused by name, never merged wrongly: see `config.py`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...adapters import NOTHING, Adapter, Change, Full, Rows, Waived, unwrapped
from ...errors import Fault, MalformedError, UnsupportedError
from ...storage.checkpoint import read_weights
from ...storage.filenames import is_beside
from ...storage.json_files import read_json
from ...storage.refs import Source
from ...storage.safetensors import StoredTensor
from .config import LORA, Config, is_saved_embedding, refuse_unsupported
from .forms import EMPTY
from .modules import (
    CONFIG,
    PARTS,
    TOKENS,
    WEIGHTS,
    is_usual,
    plain,
    promised,
    taken_apart,
    updates_of,
    without_base_layer,
    wrapped_whole,
)

if TYPE_CHECKING:
    from ...adapters.new_adapter import Writer
    from ...storage.file_view import FileView
    from .beside import ReadBeside
    from .kinds import KindReader

__all__ = ["LIBRARY", "NAME", "TAKES", "WEIGHTS", "is_config", "read", "read_refused", "recognises", "writer"]

NAME = LIBRARY = "peft"
TAKES: tuple[str, ...] = ()
OF_TORCHTUNE = {"r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path"}
"""The fields of the config that torchtune writes for PEFT, which has no others."""
_OF_TRAINING = re.compile(r"\.(lora_velora_embed|lora_monteclora_sampler)\b")


def is_config(raw: Mapping[str, Any]) -> bool:
    """Return True for the content of PEFT's adapter_config.json, by its method and its fields."""
    return raw.get("peft_type") not in (None, "DORA") and raw.keys() != OF_TORCHTUNE


def recognises(view: FileView) -> bool:
    """Return True for a PEFT adapter's folder, or for the weight file in it."""
    named = not view.lone or any(name in WEIGHTS for name in view.names)
    return named and view.has(CONFIG) and (not view.folder or is_config(view.config))


def read(source: Source, waived: Waived = NOTHING) -> Adapter:
    """Read a PEFT adapter's config and headers, and those of weight files beside it.

    Raises MalformedError for values of a wrong type, UnsupportedError for known kinds that are refused.
    """
    source = _folder(source)
    raw = read_json(source.path / CONFIG)
    reader = _reader(raw, source)
    if reader:
        reader.refuse(source.name, waived.fields)
        config = reader.config
    else:
        refuse_unsupported(raw, source.name, waived.fields)
        config = Config.parse(raw, source.path / CONFIG)
    weights = _weights(source)
    if not (tensors := read_weights(weights).tensors):
        raise MalformedError(f"{weights} holds no tensors.")
    adapter = _SortedTensors(config, reader)
    for name, tensor in tensors.items():
        if not (reader and reader.keeps(name, tensor)):
            adapter.sort(name, tensor)
    adapter.finish()
    files = _beside(source.path, waived, adapter)
    applied = [file for file in files if file.fate == "applied"]
    others = {f"{file.path.name}: {name}": tensor for file in applied for name, tensor in file.tensors.items()}
    return Adapter(
        source=source,
        format=NAME,
        kind=reader.kind.name if reader else config.kind,
        changes=tuple(adapter.changes),
        tensors={**tensors, **others} if others else tensors,
        files=(source.path / CONFIG, weights, *(file.path for file in applied)),
        base=config.base or None,
        revision=config.revision or None,
        ignored=adapter.ignored,
        faults=tuple(adapter.faults),
        keeps_ties=config.keeps_ties,
        layers=config.layers,
        task=config.task,
        promised=partial(promised, config, adapter.pruned),
        warnings=_doubts(config, source, adapter.modules) if not reader else (),
        beside=tuple(file.about for file in files),
    )


def _doubts(config: Config, source: Source, modules: Collection[str]) -> tuple[str, ...]:
    """Return warnings about a config that does not fit its tensors; most configs need no closer look."""
    if is_usual(config, modules):
        return ()
    from .doubts import doubts_of

    return tuple(doubts_of(config, source.name, modules))


def _reader(raw: Mapping[str, Any], source: Source) -> KindReader | None:
    """Return the reader of an adapter that is not LoRA; None for LoRA, and for kinds that are not merged."""
    if str(raw.get("peft_type")).upper() in LORA:
        return None
    from .kinds import find_kind

    return find_kind(raw, source.path / CONFIG)


def _beside(folder: Path, waived: Waived, adapter: _SortedTensors) -> list[ReadBeside]:
    """Read the weight files beside the adapter, and enter their tensors."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and is_beside(path.name))
    if not paths:
        return []
    from .beside import read_beside

    files = list(read_beside(paths, waived.files, {change.module for change in adapter.changes}))
    for file in files:
        if file.fate == "applied":
            adapter.changes += file.changes
        elif file.fate == "ignored":
            adapter.ignored |= dict.fromkeys(file.tensors, f"in {file.path.name}, which --ignore-file leaves out")
    return files


def _folder(source: Source) -> Source:
    """Return an adapter's folder for the weight file in it."""
    return replace(source, path=source.path.parent) if source.path.is_file() else source


def read_refused(source: Source, waived: Waived = NOTHING) -> Adapter:
    """Read an adapter without refusing any field; of an unsupported method, read the tensors alone."""
    source = _folder(source)
    raw = read_json(source.path / CONFIG)
    try:
        return read(source, Waived(tuple(raw), waived.files))
    except UnsupportedError:
        weights, base = _weights(source), raw.get("base_model_name_or_path")
    return Adapter(
        source=source,
        format=NAME,
        kind=str(raw.get("peft_type") or "unknown"),
        changes=(),
        tensors=read_weights(weights).tensors,
        files=(source.path / CONFIG, weights),
        base=base if isinstance(base, str) else None,
    )


def _weights(source: Source) -> Path:
    """Return the file that holds the tensors."""
    for name in WEIGHTS:
        if (source.path / name).exists():
            return source.path / name
    raise MalformedError(
        f"ADAPTER {source.address} has {CONFIG} but no {WEIGHTS[0]}.", hint="put its weights beside it"
    )


@dataclass
class _SortedTensors:
    """An adapter's tensors, sorted by their names."""

    config: Config
    reader: KindReader | None = None
    """The reader of an adapter that is not LoRA."""
    changes: list[Change] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    modules: dict[str, dict[str, StoredTensor]] = field(default_factory=partial(defaultdict, dict))
    others: list[tuple[str, str, StoredTensor]] = field(default_factory=list)
    wrapped: set[str] = field(default_factory=set)
    """Modules whose tokens are trained."""

    def sort(self, name: str, tensor: StoredTensor) -> None:
        """Sort one tensor in by the end of its name; tensors of the model itself wait for all others."""
        parts = self.reader.kind.parts if self.reader else PARTS
        module, end = taken_apart(name, parts)
        if end in parts:
            self._add_part(module, parts[end], tensor)
        else:
            self.others.append((plain(name, parts), end, tensor))
            self.wrapped |= {module} if end else set()

    def _add_other(self, target: str, end: str, tensor: StoredTensor) -> None:
        """Add a tensor that is not a part of a low-rank update."""
        if end in TOKENS:
            self._add_rows(target.removesuffix(end), tensor)
        elif 0 in tensor.shape:
            self.faults.append(Fault(tensor.name, EMPTY))
        elif end:
            self.changes.append(Change(f"{target.removesuffix(end)}.weight", Full(tensor, copied=True)))
        elif _OF_TRAINING.search(target):
            self.ignored[tensor.name] = "used in training only"
        elif (whole := wrapped_whole(target)) and self._may_be_whole(f"{whole[0]}.weight"):
            if whole[1] == "original_module":
                self.ignored[tensor.name] = "what the base had there"
            else:
                self._add_full(whole[0] + whole[2], tensor)
        else:
            self._add_full(target, tensor)

    def _may_be_whole(self, target: str) -> bool:
        """Return True if PEFT saves a weight's module whole, as the config says or of its own accord."""
        return self.config.saves(target) or is_saved_embedding(unwrapped(target))

    def _add_full(self, target: str, tensor: StoredTensor) -> None:
        """Add a tensor of the model itself."""
        outer = target.partition(".base_layer.")[0]  # PEFT saves a wrapped embedding or head whole
        lone = {outer} if is_saved_embedding(f"{unwrapped(outer)}.weight") else set()
        bare = without_base_layer(target, {*self.modules, *self.wrapped, *lone})
        saves = self.config.saves(bare)
        if bare != target or is_saved_embedding(unwrapped(bare)):
            start = self.config.start if bare != target else None
            self.changes.append(Change(bare, Full(tensor, start=start, copied=bare != target or not saves)))
        elif saves:
            self.changes.append(Change(target, Full(tensor, may_add=True)))
        elif self.config.bias != "none" and target.endswith(".bias"):
            self.changes.append(Change(target, Full(tensor)))
        else:
            kind = self.reader.kind.name if self.reader else "LoRA"
            self.faults.append(Fault(tensor.name, f"neither a {kind} tensor nor part of modules_to_save"))

    def _add_part(self, module: str, part: str, tensor: StoredTensor) -> None:
        parts = self.modules[module]
        if part in parts:
            self.faults.append(Fault(tensor.name, f"says what {parts[part].name} says already"))
        parts[part] = tensor

    def _add_rows(self, module: str, tensor: StoredTensor) -> None:
        index = self.config.index(module)
        if len(set(index)) != len(index) or tensor.shape[:1] != (len(index),):
            why = f"has shape {tensor.shape}; trainable_token_indices lists {len(set(index))} tokens for it"
            self.faults.append(Fault(tensor.name, why))
        else:
            self.changes.append(Change(f"{module}.weight", Rows(tensor, index)))

    @property
    def pruned(self) -> frozenset[str]:
        """The modules whose tensors are all empty: faults, but for AdaLoRA."""
        modules = self.modules if self.config.adalora else {}
        return frozenset(name for name, parts in modules.items() if all(0 in x.shape for x in parts.values()))

    def finish(self) -> None:
        """Turn each module's tensors into updates."""
        for other in self.others:
            self._add_other(*other)
        self.config.refuse_slow_patterns(self.modules)
        saved = {change.target for change in self.changes}
        updates = self.reader.updates_of if self.reader else updates_of
        for outcome in updates(self.modules, saved, self.config):
            if isinstance(outcome, Fault):
                self.faults.append(outcome)
            elif isinstance(outcome, Change):
                self.changes.append(outcome)
            else:
                self.ignored |= outcome


def writer() -> Writer:
    """Return what writes the format. A merge never imports it."""
    from . import write

    return write
