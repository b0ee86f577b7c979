"""Read the trained weights that trainers save beside an adapter's own file.

    non_lora_trainables.bin      LLaVA: the parameters that were trained and are not LoRA, by PEFT's names
    non_lora_state_dict.bin      the trainers of Qwen-VL, Phi-V and Llama-V: the same
    trainable_params.bin         LongLoRA: norms and embeddings, by the model's names
    mm_projector.bin             LLaVA's first stage
    new_embeddings.safetensors   new rows alone, in vLLM's layout
    value_head.safetensors       LLaMA-Factory: the head of a reward model; TRL has it in pytorch_model.bin

Every weight file beside the adapter counts, whatever its name. A merged or gathered model, recognised by its
name and its tensors, is left out: it holds the change already.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...adapters import Change, Full
from ...adapters.beside import FileBeside
from ...errors import DoraConvertError, MalformedError
from ...storage.checkpoint import read_weights
from ...storage.filenames import MODEL
from ...storage.safetensors import StoredTensor
from .modules import in_model


@dataclass(frozen=True)
class ReadBeside:
    """One weight file beside an adapter, and its tensors by name."""

    path: Path
    fate: str
    tensors: dict[str, StoredTensor]
    adapted: Collection[str]
    """The modules that the adapter changes."""

    @property
    def about(self) -> FileBeside:
        """The file's name, its fate, and its number of tensors."""
        return FileBeside(self.path.name, self.fate, len(self.tensors))

    @property
    def changes(self) -> list[Change]:
        """The tensors as replacements of the base's."""
        return [
            Change(in_model(name, self.adapted), Full(tensor, file=self.path.name))
            for name, tensor in self.tensors.items()
        ]


def read_beside(paths: Iterable[Path], ignored: Collection[str], adapted: Collection[str]) -> Iterator[ReadBeside]:
    """Yield the weight files beside an adapter of the `adapted` modules.

    Raises MalformedError, with the option that goes on without it, for a file that cannot be read.
    """
    for path in paths:
        name = path.name
        try:
            tensors = dict(read_weights(path).tensors)
        except DoraConvertError as error:
            if name not in ignored and not MODEL.match(name):
                raise MalformedError(error.message, hint=f"--ignore-file {name} goes on without it") from error
            tensors = {}
        fate = "ignored" if name in ignored else "model" if _is_model(name, tensors, adapted) else "applied"
        yield ReadBeside(path, fate, tensors, adapted)


def _is_model(name: str, tensors: Collection[str], adapted: Collection[str]) -> bool:
    """Return True for the weights of a whole model, also for a file of such a name that cannot be read."""
    modules = {in_model(tensor, adapted).rpartition(".")[0] for tensor in tensors}
    holds_change = any(".lora_" in tensor for tensor in tensors) or not modules.isdisjoint(adapted)
    return MODEL.match(name) is not None and (holds_change or not tensors)
