"""Read llama.cpp's LoRA adapters: GGUF files of `general.type` adapter.

Tensors are named `<llama.cpp's name of the weight>.lora_a` (r, in) and `.lora_b` (out, r). The scaling is
`adapter.lora.alpha` over each tensor's rank, and 1 if alpha is 0. In the architecture llama, rows of q and k lie in
Meta's order. llama.cpp has no DoRA.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from ...adapters import NOTHING, Adapter, Change, LowRank, Waived
from ...adapters.parts import Findings, sort_parts, wrong_parts
from ...adapters.rotary import head_size, heads_unknown, meta_rows
from ...errors import UnsupportedError
from ...storage.checkpoint import Checkpoint
from ...storage.file_view import FileView
from ...storage.refs import Source
from ...storage.stored_view import view as view_of
from .names import OUTSIDE, PERMUTED, ROTARY, modules_of

if TYPE_CHECKING:
    from ...adapters.new_adapter import Writer

NAME = "gguf"
LIBRARY = "llama.cpp"
TAKES: tuple[str, ...] = ()
ENDS = {".lora_a": "A", ".lora_b": "B"}
EMBEDDING = "token_embd.weight"
"""The weight whose factor A is stored turned: (tokens, r)."""


def recognises(view: FileView) -> bool:
    """Return True for a GGUF file that holds an adapter."""
    return _file(view) is not None


def _file(view: FileView) -> str | None:
    files = [name for name in view.names if name.endswith(".gguf")] if view.folder else []
    headers = ((name, view.header(name)) for name in files)
    return next((name for name, head in headers if head and head.metadata.get("general.type") == "adapter"), None)


def read(source: Source, waived: Waived = NOTHING) -> Adapter:  # noqa: ARG001 - files say all
    """Read a file's pairs and names; UnsupportedError for other kinds of adapters than LoRA."""
    view = FileView.of(source.path)
    file = str(_file(view))
    header = view.need(file)
    if (kind := header.metadata.get("adapter.type")) != "lora":
        raise UnsupportedError(f"{source.name} is an adapter of llama.cpp's type {kind!r}; only lora is merged.")
    alpha = float(header.metadata.get("adapter.lora.alpha", "0"))
    architecture = header.metadata.get("general.architecture", "")
    modules, rest = sort_parts(header.tensors, ENDS)
    findings = Findings()
    for module, parts in modules.items():
        if why := wrong_parts(parts, {"A", "B"}, ENDS):
            findings.fault(parts.values(), why)
            continue
        A, is_embedding = parts["A"], module == EMBEDDING
        A = view_of(A, turned=True) if is_embedding and len(A.shape) == 2 else A
        rank = A.shape[0]
        scale, rule = (alpha / rank, f"alpha {alpha:g} / rank {rank}") if alpha else (1.0, "alpha 0: 1")
        low = LowRank(A, parts["B"], scale, transposed=is_embedding)
        findings.changes.append(Change(f"{hub_name(module, architecture)}.weight", low, rule=rule))
    findings.fault(rest.values(), "is not part of a LoRA of llama.cpp's form")
    fit = _fit if architecture in PERMUTED else None
    return findings.adapter(view, [file], source, format=NAME, kind="LoRA", fit=fit)


def hub_name(module: str, architecture: str) -> str:
    """Return the Hub's name of a weight of llama.cpp's, without `.weight`."""
    name = module.removesuffix(".weight")
    if match := re.fullmatch(r"blk\.(\d+)\.(.+)", name):
        names = {own: hub for hub, own in modules_of(architecture).items()}
        return f"model.layers.{match[1]}.{names.get(match[2], match[2])}"
    return next((hub for hub, own in OUTSIDE.items() if own == name), name)


def _fit(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter with the rows of q and k in the base's order."""
    changes = []
    for change in adapter.changes:
        low = change.update
        if isinstance(low, LowRank) and change.module.endswith(ROTARY):
            if not (size := head_size(base, low.outputs, change.module)):
                raise heads_unknown(base, change.module)
            low = replace(low, B=view_of(low.B, meta_rows(low.outputs, size)))
        changes.append(replace(change, update=low))
    return replace(adapter, changes=tuple(changes))


def writer() -> Writer:
    """Return what writes the format. A merge never imports it."""
    from . import write

    return cast("Writer", write)
