"""Name the tools whose adapters are not read yet, by their files: kohya, MLX, diffusers and others.

Only messages depend on this file. A format that is read has a file of its own and a line in `detect.FORMATS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from ..errors import DoraConvertError
from ..storage.checkpoint import read_weights
from ..storage.filenames import PICKLES
from ..storage.json_files import read_json

FEW = 5
"""So many weight files of a folder are opened."""
SAMPLED = 500
"""So many names of tensors are looked at."""

_TENSORS = {
    "LyCORIS": r"\.(hada_|lokr_|dora_scale)|^lycoris_",
    "kohya": r"\.lora_(down|up)\.|^lora_(unet|te\d?)_",
    "fsdp_qlora": r"\.(dora_layer|magnitude_layer|lora_AB)\.",
    "NVlabs' DoRA": r"\.weight_m_wdecomp\.",
    "AdapterHub": r"\.(loras|adapters|prefix_tunings)\.",
    "diffusers": r"^(unet|transformer(?!\.h)|text_encoder(_2)?)\..*\.(lora_A|lora_B|lora|processor)\.",
    "torchtune": r"\.lora_[ab]\.weight$",
    "MLX": r"\.lora_[ab]$",
    "LitGPT": r"\.attn\.qkv\.lora_[AB]$",
    "loralib": r"\.lora_[AB]$",
}
"""Regular expressions for names of tensors; the first that matches any tensor counts."""
_FILES = {
    "diffusers": r"pytorch_lora_weights\.(safetensors|bin)",
    "MLX": r"adapters\.(safetensors|npz)",
    "AdapterHub": r"pytorch_adapter\.bin",
    "LitGPT": r".*\.pth\.lora",
}
_GGUF_ADAPTER = re.compile(rb"GGUF.*general\.type\x08\x00{3}\x07\x00{7}adapter", re.DOTALL)


def name_foreign(path: Path) -> str | None:
    """Return the tool that wrote an adapter, a folder or a file; None for anything else."""
    folder = path if path.is_dir() else path.parent
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else [path.name]
    weights = [folder / name for name in names if name.endswith((".safetensors", ".gguf", *PICKLES))]
    by_file = (tool for tool, pattern in _FILES.items() for name in names if re.fullmatch(pattern, name))
    return _by_config(folder / "adapter_config.json") or next(by_file, None) or _by_weights(weights[:FEW])


def name_tensors(names: Iterable[str]) -> str | None:
    """Return the tool that names an adapter's tensors so; None for a model's tensors, and for PEFT's."""
    text = list(islice(names, SAMPLED))
    return next((tool for tool, pattern in _TENSORS.items() if any(re.search(pattern, name) for name in text)), None)


def _by_config(path: Path) -> str | None:
    try:
        config = read_json(path)
    except DoraConvertError:
        return None
    if "fine_tune_type" in config or "lora_parameters" in config:
        return "MLX"
    nested = config.get("config")
    if str(config.get("version")).startswith("adapters.") or (isinstance(nested, dict) and "architecture" in nested):
        return "AdapterHub"
    return None


def _by_weights(paths: Iterable[Path]) -> str | None:
    for path in paths:
        if path.suffix == ".gguf":
            with path.open("rb") as file:
                found = "GGUF" if _GGUF_ADAPTER.match(file.read(1 << 16)) else None
        else:
            found = name_tensors(_names(path))
        if found:
            return found
    return None


def _names(path: Path) -> Iterable[str]:
    try:
        return read_weights(path).tensors
    except DoraConvertError:
        return ()
