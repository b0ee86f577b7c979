"""An adapter as headers: which weight each tensor speaks about, in one form for all file formats."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Fault, RefError
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor
from .updates import Update


@dataclass(frozen=True)
class Change:
    """One update and the weight it is for, by the name that the model's state dict has for it."""

    target: str
    update: Update
    among: tuple[str, ...] = ()
    """All the weights that it may be for, where only shapes can tell: `target` is one of them."""
    rule: str = ""
    """How its scaling came about, such as "alpha 16 / rank 8"."""


@dataclass(frozen=True)
class Adapter:
    """Everything a plan needs to know of an adapter."""

    source: Source
    format: str  # "peft"
    kind: str  # "LoRA", "DoRA", "AdaLoRA", …
    changes: tuple[Change, ...]
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...]
    """The files that define it: their hashes identify the adapter."""
    base: str | None = None
    """The base it was trained on, as its author named it."""
    revision: str | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Tensors that take no part in a merge, with the reason."""
    faults: tuple[Fault, ...] = ()
    """What contradicts itself in it, for the plan to report with all that does not fit."""
    keeps_ties: bool = False
    """Whether embedding and head were trained as one weight."""
    layers: tuple[int, ...] = ()
    """The base's layers in the order of the trained model, where some were repeated or left out."""
    task: str | None = None
    """The class of model it was trained in, such as LlamaForSequenceClassification, or how that ends."""


def open_adapter(source: Source, accepted: Collection[str] = ()) -> Adapter:
    """Recognise the format of an adapter folder and read its headers; `accepted` config fields are not refused.

    Raises RefError where no format recognises the folder, and what the format raises.
    """
    from ..formats.detect import FORMATS

    for known in FORMATS:
        if known.recognises(source.path):
            return known.read(source, accepted)
    raise _not_an_adapter(source)


def _not_an_adapter(source: Source) -> RefError:
    """Say what the folder is instead, and where the adapter might be."""
    root = source.path
    if root.is_file():
        return RefError(
            f"ADAPTER {source.name} is a file; name the folder it lies in.", hint=str(root.parent)
        )
    below = sorted(path.parent for path in root.glob("*/adapter_config.json"))
    below += sorted(path.parent for path in root.glob("*/*/adapter_config.json"))
    if below:
        names = ", ".join(path.relative_to(root).as_posix() for path in below[:10])
        return RefError(
            f"ADAPTER {source.name} has no adapter_config.json, but these folders inside it do: {names}.",
            hint=f"name one of them, such as {below[-1]}",
        )
    if (root / "config.json").exists():
        return RefError(f"ADAPTER {source.name} is a model, not an adapter: it has no adapter_config.json.")
    return RefError(f"ADAPTER {source.name} has no adapter_config.json.")
