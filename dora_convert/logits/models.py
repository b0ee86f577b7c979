"""Checkpoints and adapters as running models, through transformers and PEFT; whole in memory, or from their files."""

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
from torch import nn

from ..adapters.adapter import Adapter
from ..errors import MalformedError, UnsupportedError
from ..storage.checkpoint import Checkpoint
from .forward import Runner
from .offload import attach, stand_in, weights_on_disk
from .rounding_floor import plain_name

WEIGHTS_LEVEL = "verify --level weights needs no model code"
AUTO = {
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForCausalLM": "AutoModelForCausalLM",
}
"""What to load a model with whose own class transformers does not have, by how the class's name ends."""


@dataclass(frozen=True)
class Spec:
    """Which class of model to run, and the config to make it with."""

    name: str
    model_class: Any
    config: Any


_alone = threading.Lock()
"""What `quiet` sets is the whole process's: of several threads one runs models at a time."""


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Keep what others have to say off the terminal while the block runs, and torch's random numbers as they were."""
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
    """A folder of links to what a loader may see of a checkpoint: config, small files, and the weights that count.

    Other weights beside them, or an adapter's config, would mislead it. Nothing is copied.
    """
    folder.mkdir()
    root = checkpoint.root.resolve()
    for name in ("config.json", "generation_config.json", *checkpoint.side_files):
        if "/" not in name and (root / name).is_file() and not (folder / name).is_symlink():
            (folder / name).symlink_to((root / name).resolve())
    for shard in checkpoint.shards:
        suffix = Path(shard.filename).suffix
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        name = shard.filename if checkpoint.index_name else f"{stem}{'.bin' if stem[0] == 'p' else suffix}"
        (folder / name).symlink_to((root / shard.filename).resolve())
    if checkpoint.index_name:
        table = {t.name: shard.filename for shard in checkpoint.shards for t in shard.tensors}
        stem = (
            "model.safetensors"
            if checkpoint.index_name.endswith(".safetensors.index.json")
            else "pytorch_model.bin"
        )
        (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def specify(folder: Path, wanted: Mapping[str, Any] | None) -> Spec:
    """The class that a config names, and the config of the model in a folder.

    `wanted` is the config as it should be: its class counts, and the labels that its head tells apart.

    Raises UnsupportedError where the installed transformers has no such model.
    """
    import transformers

    wanted = wanted or {}
    if not (names := wanted.get("architectures")):
        raise UnsupportedError(
            "config.json names no architecture, so it is not known what to run.", hint=WEIGHTS_LEVEL
        )
    if wanted.get("quantization_config"):
        raise UnsupportedError("The model is quantised; its outputs are not compared.", hint=WEIGHTS_LEVEL)
    labels = {}
    if isinstance(table := wanted.get("id2label"), Mapping):
        labels = {
            "id2label": {int(key): value for key, value in table.items()},
            "label2id": wanted.get("label2id"),
        }
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **labels)
    except Exception as error:
        raise _not_run(f"transformers {transformers.__version__} does not know the model", error) from error
    model_class = getattr(transformers, names[0], None) or _auto(names[0], config)
    if model_class is None:
        raise UnsupportedError(
            f"transformers {transformers.__version__} has no {names[0]}.", hint=WEIGHTS_LEVEL
        )
    return Spec(names[0], model_class, config)


def _auto(name: str, config: Any) -> Any:
    """transformers' own choice for a config and a task, where it has one."""
    import transformers

    for suffix, auto in {**AUTO, "Model": "AutoModel"}.items():
        found = getattr(transformers, auto)
        if name.endswith(suffix) and type(config) in found._model_mapping:  # noqa: SLF001 - there is no public way
            return found._model_mapping[type(config)]  # noqa: SLF001
    return None


def _not_run(what: str, error: Exception) -> UnsupportedError:
    why = re.sub(r"\s+", " ", str(error)).strip()
    return UnsupportedError(f"{what} ({type(error).__name__}: {why[:300]}).", hint=WEIGHTS_LEVEL)


Loaded = Callable[[str, nn.Module], None]


@dataclass(frozen=True)
class Loader:
    """How models are loaded for one comparison."""

    device: torch.device
    offload: bool
    scratch: Path
    """For what a loader cannot use as it lies in the files."""

    def run(self, spec: Spec, folder: Path) -> tuple[Runner, set[str]]:
        """A checkpoint as a model, and the weights that it has none for."""
        model, missing = self._load(spec, folder)
        if self.offload:
            attach(model, weights_on_disk(model), self.device, lambda _name, _module: None)
        return Runner(model, self.device, _generates(model)), missing

    def reference(
        self, spec: Spec, folder: Path, adapters: Sequence[Adapter], vocabulary: int | None, loaded: Loaded
    ) -> Runner:
        """Base and adapters as PEFT runs them, unmerged; `loaded` is called with every block that is read from disk.

        `vocabulary` is how many tokens the trained model knows, where the base knows others.

        Raises UnsupportedError where transformers or PEFT does not take them.
        """
        model, missing = self._load(spec, folder)
        if self.offload and vocabulary:
            raise UnsupportedError(
                "A model with a new vocabulary is only compared whole.", hint="a larger --max-memory"
            )
        if vocabulary:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        generates = _generates(model)
        source: Mapping[str, Any] = {}
        if self.offload:
            source = weights_on_disk(model)
            stand_in(model, source, _saved_whole(adapters))
        wrapped = _wrap(model, adapters)
        _refuse_missing(wrapped, missing)
        if self.offload:
            attach(wrapped.get_base_model(), source, self.device, loaded)
        return Runner(wrapped, self.device, generates)

    def _load(self, spec: Spec, folder: Path) -> tuple[Any, set[str]]:
        """The model in float32 and in eval mode, and the weights that its files lack."""
        where: dict[str, Any] = {"device_map": {"": self.device}} if self.device.type != "cpu" else {}
        if self.offload:
            where = {"device_map": {"": "disk"}, "offload_folder": str(self.scratch)}
        try:
            model, info = spec.model_class.from_pretrained(
                folder, config=spec.config, dtype=torch.float32, output_loading_info=True, **where
            )
        except Exception as error:
            raise _not_run(f"{spec.name} cannot be loaded", error) from error
        if bad := info.get("mismatched_keys"):
            raise MalformedError(f"{spec.name} has other shapes than its config says: {min(map(str, bad))}.")
        model.eval()
        model.config.use_cache = False
        return model, set(info["missing_keys"])


def _generates(model: Any) -> bool:
    return bool(model.can_generate())


def _saved_whole(adapters: Sequence[Adapter]) -> Callable[[str], bool]:
    """Whether an adapter's files hold a weight as it is, by its name in the model: PEFT writes it over the base's."""
    names = {plain_name(name) for adapter in adapters for name in adapter.tensors if ".lora_" not in name}
    return names.__contains__


def _wrap(model: Any, adapters: Sequence[Adapter]) -> Any:
    """PEFT's own model of base and adapters, all of them active."""
    import peft

    first, *others = adapters
    names = ["default", *(f"adapter{number}" for number in range(1, len(adapters)))]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrapped: Any = peft.PeftModel.from_pretrained(
                model, os.fspath(first.source.path), is_trainable=False
            )
            lost = []
            for name, adapter in zip(names[1:], others, strict=True):
                lost += wrapped.load_adapter(os.fspath(adapter.source.path), adapter_name=name).missing_keys
            if others:
                wrapped.base_model.set_adapter(names)
    except Exception as error:
        raise _not_run(f"PEFT {peft.__version__} cannot load {first.source.name}", error) from error
    lost += [str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message)]
    if lost:
        raise UnsupportedError(
            f"PEFT {peft.__version__} does not find all of the adapter's tensors: {lost[0][:300]}",
            hint=WEIGHTS_LEVEL,
        )
    return wrapped.eval()


def _refuse_missing(wrapped: Any, missing: set[str]) -> None:
    """Weights that neither base nor adapter has would be random."""
    given = {
        re.sub(r"\.modules_to_save\.[^.]+", "", name.removeprefix("base_model.model."))
        for name, _ in wrapped.named_parameters()
        if ".modules_to_save." in name
    }
    if random := sorted(missing - given):
        raise UnsupportedError(
            f"{len(random)} weights are neither in BASE nor in ADAPTER, such as {random[0]}.",
            hint=WEIGHTS_LEVEL,
        )
