"""Run a model whose weights stay in their files: each block reads its weights only while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .memory import units
from .rounding_floor import plain_name

OnLoad = Callable[[str, nn.Module], None]
"""Is called with the name of a block, and the block, after the block has read its weights."""


def weights_on_disk(model: Any) -> Mapping[str, Tensor]:
    """Return the weights of a model that transformers keeps on disk, and remove transformers' hooks."""
    from accelerate.hooks import remove_hook_from_submodules

    hooks: Iterator[Any] = (getattr(module, "_hf_hook", None) for module in model.modules())
    maps: Iterator[Any] = (getattr(hook, "weights_map", None) for hook in hooks)
    weights: Mapping[str, Tensor] = next((each.dataset for each in maps if hasattr(each, "dataset")), {})
    remove_hook_from_submodules(model)
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map
    return weights


def stand_in(model: nn.Module, weights: Mapping[str, Tensor], saved: Callable[[str], bool]) -> None:
    """Give weights on disk a shape but no memory, so that adapters can be put around them.

    Weights for which `saved` is True are read: PEFT writes over them.
    """
    for name, value in list(model.named_parameters(remove_duplicate=False)):
        if value.device.type == "meta":
            owner = model.get_submodule(name.rpartition(".")[0])
            data = weights[name] if saved(name) else torch.zeros((), dtype=value.dtype).expand(value.shape)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(data, requires_grad=False))


class BlockWeights(Mapping[str, Tensor]):
    """The weights of one block: the adapter's from memory, all others from the files by their plain names."""

    def __init__(self, block: nn.Module, prefix: str, weights: Mapping[str, Tensor]) -> None:
        self._prefix, self._weights = prefix, weights
        self._own = {
            name: value.data
            for name, value in block.named_parameters(remove_duplicate=False)
            if value.device.type != "meta" and (any(value.stride()) or plain_name(prefix + name) not in weights)
        }

    def __getitem__(self, name: str) -> Tensor:
        if name in self._own:
            return self._own[name].clone()  # the copy may be perturbed
        return self._weights[plain_name(self._prefix + name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def attach(model: nn.Module, weights: Mapping[str, Tensor], device: torch.device, on_load: OnLoad) -> None:
    """Make every block of a model read its weights, then call `on_load`, before it runs."""
    from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module

    class AfterLoading(ModelHook):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.name = name

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            on_load(self.name, module)
            return args, kwargs

    for name, unit in list(units(model)):
        prefix = f"{name}." if name else ""
        hook = AlignDevicesHook(
            execution_device=device,
            offload=True,
            weights_map=BlockWeights(unit, prefix, weights),
            place_submodules=True,
        )
        add_hook_to_module(unit, hook)
        add_hook_to_module(unit, AfterLoading(prefix), append=True)
    for module in model.modules():
        for key, value in list(module.named_buffers(recurse=False)):
            if value.device != device:
                module.register_buffer(key, value.to(device), persistent=False)
