"""Name the tools whose adapters are not merged, by their files, and say why.

A format that is read has a file of its own. Here is one line for each of the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from ..adapters import NOTHING, Adapter, Waived
from ..adapters.parts import Findings
from ..errors import UnsupportedError
from ..storage.file_view import FileView
from ..storage.filenames import MODEL
from ..storage.refs import Source
from ..storage.safetensors import StoredTensor

NAME = "refused"
LIBRARY = ""
TAKES: tuple[str, ...] = ()


class Signature(NamedTuple):
    """One tool, a regular expression for names of its tensors, and the reason for which they are not merged."""

    tool: str
    tensors: str
    why: str


CONFIG = "adapter_config.json"
NOT_YET = "which is not read yet"
ADDS = "which adds modules to the model: no single weight equals it"
PEFT = Signature("PEFT without adapter_config.json", r"^base_model\.model\..*\.lora_[AB]\.", "which has rank and alpha")
SIGNATURES = (
    PEFT,
    Signature("Megatron", r"\.adapter\.(linear_in|linear_out)\.weight$|\.weight_magnitude$",
              "whose fused and sharded modules are not read: export it to PEFT's format with Megatron-Bridge"),
    Signature("KerasHub", r"lora_kernel_[ab]", NOT_YET),
    Signature("LyCORIS' sparse bias", r"\.bias_indices$", NOT_YET),
    Signature("X-LoRA", r"internal_xlora", "which chooses among adapters per token: no single weight equals it"),
    Signature("AdapterHub", r"\.(adapters|prefix_tunings)\.", ADDS),
    Signature("MLX's fused layers", r"\.lora_[ab]\.\d+$", NOT_YET),
    Signature("LoRA in a form without a name", r"\.lora_?[ABab]\b|\.lora_(up|down)\b|_lora_[ab]\b", NOT_YET),
)  # fmt: skip
"""The first line that matches any tensor counts."""


def recognises(view: FileView) -> bool:
    """Return True for the files of a tool in the table."""
    return _find(view) is not None


def _find(view: FileView) -> Signature | None:
    for name in view.candidates:
        if MODEL.match(name):
            continue  # a model may have a layer called lora_A
        if found := _first_match(view.tensors(name)):
            # PEFT's own reader says what a config lacks
            return None if found is PEFT and view.has(CONFIG) else found
    return None


def _first_match(tensors: Mapping[str, StoredTensor]) -> Signature | None:
    return next((one for one in SIGNATURES if any(re.search(one.tensors, name) for name in tensors)), None)


def read(source: Source, waived: Waived = NOTHING) -> Adapter:  # noqa: ARG001 - read by no words
    """Raise UnsupportedError, with the tool and the reason."""
    view = FileView.of(source.path)
    found = _find(view)
    assert found
    raise UnsupportedError(
        f"ADAPTER {source.address} is an adapter in the format of {found.tool}, {found.why}.",
        hint=f"put its {CONFIG} beside it" if found is PEFT else "docs/formats.md lists the formats that are read",
    )


def read_refused(source: Source, waived: Waived) -> Adapter:  # noqa: ARG001 - as `read`
    """Return an adapter with its tensors and the name of its tool, and no changes."""
    view = FileView.of(source.path)
    found = _find(view)
    files = [name for name in view.weights if view.tensors(name)]
    maker = found.tool if found else None
    return Findings().adapter(view, files, source, format=NAME, kind="unknown", maker=maker)
