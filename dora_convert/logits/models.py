"""Load checkpoints and adapters as models through transformers and PEFT, whole or block by block."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter
from ..errors import MalformedError, UnsupportedError
from ..storage.checkpoint import Checkpoint
from .forward import ModelRunner, not_compared
from .offload import OnLoad, attach, stand_in, weights_on_disk
from .rounding_floor import plain_name

TASKS = {
    "ForConditionalGeneration": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "ForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "ForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "ForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "ForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "LMHeadModel": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "ForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "Model": "MODEL_MAPPING",
}
"""transformers' tables of model classes by config class, by the end of an architecture's name."""


@dataclass(frozen=True)
class ModelSpec:
    """The name and class of a model, and its config."""

    name: str
    model_class: Any
    config: Any


_alone = threading.Lock()
"""`quiet` changes the whole process, so only one thread runs models at a time."""


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Silence other libraries while the block runs, and restore torch's random state afterwards."""
    import transformers

    bars: Any = transformers.utils.logging
    with _alone:
        shown, level = bars.is_progress_bar_enabled(), logging.root.manager.disable
        logging.disable(logging.ERROR)
        bars.disable_progress_bar()
        try:
            with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices=[]):
                warnings.simplefilter("always")
                torch.manual_seed(0)
                yield caught
        finally:
            logging.disable(level)
            if shown:
                bars.enable_progress_bar()


def view(checkpoint: Checkpoint, folder: Path) -> Path:
    """Fill `folder` with links to the config, small files and weights of a checkpoint, and return the folder.

    Stale weights or an adapter's config beside them would mislead a loader. Nothing is copied.
    """
    folder.mkdir()
    root = checkpoint.root.resolve()
    for name in ("config.json", "generation_config.json", *checkpoint.side_files):
        if "/" not in name and (root / name).is_file() and not (folder / name).is_symlink():
            (folder / name).symlink_to((root / name).resolve())
    for shard in checkpoint.shards:
        alone = "model.safetensors" if shard.filename.endswith(".safetensors") else "pytorch_model.bin"
        name = shard.filename if checkpoint.index_name else alone
        (folder / name).symlink_to((root / shard.filename).resolve())
    if checkpoint.index_name:
        table = {t.name: shard.filename for shard in checkpoint.shards for t in shard.tensors}
        (folder / f"{alone}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def specify(folder: Path, wanted: Mapping[str, Any] | None) -> ModelSpec:
    """Return the class of the model in a folder, and its config.

    `wanted` is the config after the merge: its class and its labels are used.

    Raises UnsupportedError if the installed transformers does not have the model.
    """
    import transformers

    wanted = wanted or {}
    if not (names := wanted.get("architectures")):
        raise not_compared("config.json names no architecture, so no model can be run.")
    if wanted.get("quantization_config"):
        raise not_compared("The model is quantised; its outputs are not compared.")
    labels = {}
    if isinstance(table := wanted.get("id2label"), Mapping):
        labels = {"id2label": {int(key): value for key, value in table.items()}, "label2id": wanted.get("label2id")}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **labels)
    except Exception as error:
        raise _not_run(f"transformers {transformers.__version__} does not know the model", error) from error
    similar = (getattr(transformers, table) for suffix, table in TASKS.items() if names[0].endswith(suffix))
    model_class = getattr(transformers, names[0], None) or next(
        (classes[type(config)] for classes in similar if type(config) in classes), None
    )
    if model_class is None:
        raise not_compared(f"transformers {transformers.__version__} has no {names[0]}.")
    return ModelSpec(names[0], model_class, config)


def _not_run(what: str, error: Exception) -> UnsupportedError:
    why = re.sub(r"\s+", " ", str(error)).strip()
    return not_compared(f"{what} ({type(error).__name__}: {why[:300]}).")


@dataclass(frozen=True)
class ModelLoader:
    """Loads the models of one comparison."""

    device: torch.device
    offload: bool
    scratch: Path
    """Folder for temporary copies of weights."""

    def checkpoint(self, spec: ModelSpec, folder: Path) -> tuple[ModelRunner, set[str]]:
        """Load a checkpoint; return its model, and the names of missing weights."""
        model, missing = self._load(spec, folder)
        if self.offload:
            attach(model, weights_on_disk(model), self.device, lambda _name, _block: None)
        return ModelRunner(model, self.device, bool(model.can_generate())), missing

    def reference(
        self, spec: ModelSpec, folder: Path, adapters: Sequence[Adapter], *, vocabulary: int | None, on_load: OnLoad
    ) -> ModelRunner:
        """Load base and adapters as PEFT runs them; `on_load` is called after a block is read from disk.

        `vocabulary` is the number of tokens of the trained model if the base has another number.

        Raises UnsupportedError if transformers or PEFT cannot load them.
        """
        model, missing = self._load(spec, folder)
        if vocabulary:
            if self.offload:
                hint = "a larger --max-memory"
                raise UnsupportedError("A model with a new vocabulary is only compared whole.", hint=hint)
            _resize(model, vocabulary)
        generates = bool(model.can_generate())
        weights: Mapping[str, Any] = {}
        if self.offload:
            weights = weights_on_disk(model)
            stand_in(model, weights, _saved_whole(adapters))
        wrapped = _wrap(model, adapters)
        if vocabulary:
            _fill_new_rows(wrapped.get_base_model())
        _refuse_missing(wrapped, missing)
        if self.offload:
            attach(wrapped.get_base_model(), weights, self.device, on_load)
        return ModelRunner(wrapped, self.device, generates)

    def _load(self, spec: ModelSpec, folder: Path) -> tuple[Any, set[str]]:
        """Return the model in float32 and in eval mode, and the names of weights that its files lack."""
        placement: dict[str, Any] = {"device_map": {"": self.device}} if self.device.type != "cpu" else {}
        if self.offload:
            placement = {"device_map": {"": "disk"}, "offload_folder": str(self.scratch)}
        try:
            model, info = spec.model_class.from_pretrained(
                folder, config=spec.config, dtype=torch.float32, output_loading_info=True, **placement
            )
        except Exception as error:
            raise _not_run(f"{spec.name} cannot be loaded", error) from error
        if mismatched := info.get("mismatched_keys"):
            raise MalformedError(f"{spec.name} has other shapes than its config says: {min(map(str, mismatched))}.")
        model.eval()
        model.config.use_cache = False
        return model, set(info["missing_keys"])


def _resize(model: Any, vocabulary: int) -> None:
    """Give a model another number of tokens; NaN fills new rows until an adapter's file does."""
    old = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    for side in _sides(model):
        side.weight.data[old:] = torch.nan


def _sides(model: Any) -> list[Any]:
    """Return a model's embedding, and its head if it has one."""
    return [side for side in (model.get_input_embeddings(), model.get_output_embeddings()) if side is not None]


def _fill_new_rows(model: Any) -> None:
    """Give embedding or head the other's new rows, if no file has its own: as resizing tied weights made them."""
    weights = [_weight(side) for side in _sides(model)]
    for side, other in zip(weights, reversed(weights), strict=True):
        new = side.isnan().any(dim=1)
        side[new] = other[new]


def _weight(module: Any) -> Tensor:
    """Return the weight that PEFT's model computes with: the adapter's if it saved the module, else the base's."""
    module = getattr(module, "token_adapter", module)
    for saved in getattr(module, "modules_to_save", {}).values():
        module = saved
    weight: Tensor = getattr(module, "base_layer", module).weight.data
    return weight


def _saved_whole(adapters: Sequence[Adapter]) -> Callable[[str], bool]:
    """Return a test of a weight's name: True if PEFT writes the adapter's weight over the base's."""
    names = {plain_name(name) for adapter in adapters for name in adapter.tensors if ".lora_" not in name}
    return names.__contains__


def _wrap(model: Any, adapters: Sequence[Adapter]) -> Any:
    """Return PEFT's model of base and adapters, all adapters active."""
    import peft

    first, *others = adapters
    names = ["default", *(f"adapter{number}" for number in range(1, len(adapters)))]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrapped: Any = peft.PeftModel.from_pretrained(model, os.fspath(first.source.path), is_trainable=False)
            missing = []
            for name, adapter in zip(names[1:], others, strict=True):
                missing += wrapped.load_adapter(os.fspath(adapter.source.path), adapter_name=name).missing_keys
            if others:
                wrapped.base_model.set_adapter(names)
    except Exception as error:
        raise _not_run(f"PEFT {peft.__version__} cannot load {first.source.name}", error) from error
    missing += [str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message)]
    if missing:
        raise not_compared(f"PEFT {peft.__version__} does not find all of the adapter's tensors: {missing[0][:300]}")
    return wrapped.eval()


def _refuse_missing(wrapped: Any, missing: set[str]) -> None:
    """Raise UnsupportedError for weights that neither base nor adapter has: they would be random."""
    saved = {
        re.sub(r"\.modules_to_save\.[^.]+", "", name.removeprefix("base_model.model."))
        for name, _ in wrapped.named_parameters()
        if ".modules_to_save." in name
    }
    if random := sorted(missing - saved):
        raise not_compared(f"{len(random)} weights are neither in BASE nor in ADAPTER, such as {random[0]}.")
