"""Say what a merge onto a GGUF file makes beside the weights."""

from __future__ import annotations

from collections.abc import Sequence

from ...output.side_files import SideFile
from ...settings import Settings
from ...storage.checkpoint import Checkpoint
from ...storage.filenames import TOKENIZER, is_tokenizer_file, matching


def tell_of_gguf(base: Checkpoint, files: Sequence[SideFile], settings: Settings) -> None:
    """Say which files beside the weights are made from a GGUF base, and which cannot be."""
    names = [file.name for file in files]
    made = [
        name for name in names if name not in base.side_files and (name == "config.json" or is_tokenizer_file(name))
    ]
    settings.notify(f"made from the pairs of {base.source.name}: {', '.join(made)}")
    if not matching(names, TOKENIZER):
        pairs = base.gguf.pairs if base.gguf else {}
        kind = " ".join(str(pairs.get(f"tokenizer.ggml.{key}", "")) for key in ("model", "pre")).strip() or "none"
        settings.warn(
            f"no tokenizer is written: that of {base.source.name} is of a kind that is not known ({kind}); copy the "
            "tokenizer's files of the original model into OUT"
        )
