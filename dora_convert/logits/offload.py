"""Running a model whose weights stay in their files: each block reads its own before it runs, and drops them after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .memory import units
from .rounding_floor import plain_name

Loaded = Callable[[str, nn.Module], None]


def weights_on_disk(model: Any) -> Mapping[str, Tensor]:
    """Where the weights are of a model that transformers has left on disk; its own hooks are taken off."""
    from accelerate.hooks import remove_hook_from_submodules

    hooks: Iterator[Any] = (getattr(module, "_hf_hook", None) for module in model.modules())
    maps: Iterator[Any] = (getattr(hook, "weights_map", None) for hook in hooks)
    source: Mapping[str, Tensor] = next((found.dataset for found in maps if hasattr(found, "dataset")), {})
    remove_hook_from_submodules(model)
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map
    return source


def stand_in(model: nn.Module, source: Mapping[str, Tensor], saved: Callable[[str], bool]) -> None:
    """Give weights that are on disk a shape and no memory, so that adapters can be put around them.

    Those of modules that an adapter has saved whole are read: they are written over.
    """
    for name, value in list(model.named_parameters(remove_duplicate=False)):
        if value.device.type == "meta":
            owner = model.get_submodule(name.rpartition(".")[0])
            data = source[name] if saved(name) else torch.zeros((), dtype=value.dtype).expand(value.shape)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(data, requires_grad=False))


class Weights(Mapping[str, Tensor]):
    """The weights of one module: from the files by their plain names, or from memory where they are the adapter's."""

    def __init__(self, module: nn.Module, prefix: str, source: Mapping[str, Tensor]) -> None:
        self._prefix, self._source = prefix, source
        self._own = {
            name: value.data
            for name, value in module.named_parameters(remove_duplicate=False)
            if value.device.type != "meta"
            and (any(value.stride()) or plain_name(prefix + name) not in source)
        }

    def __getitem__(self, name: str) -> Tensor:
        if name in self._own:
            return self._own[name].clone()  # which may be moved by half a unit
        return self._source[plain_name(self._prefix + name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def attach(model: nn.Module, source: Mapping[str, Tensor], device: torch.device, loaded: Loaded) -> None:
    """Have every block of a model read its weights before it runs; `loaded` is called each time with its name and it."""
    from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module

    class AfterLoading(ModelHook):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.name = name

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            loaded(self.name, module)
            return args, kwargs

    for name, unit in list(units(model)):
        prefix = f"{name}." if name else ""
        hook = AlignDevicesHook(
            execution_device=device,
            offload=True,
            weights_map=Weights(unit, prefix, source),
            place_submodules=True,
        )
        add_hook_to_module(unit, hook)
        add_hook_to_module(unit, AfterLoading(prefix), append=True)
    for buffer_owner in model.modules():
        for key, value in list(buffer_owner.named_buffers(recurse=False)):
            if value.device != device:
                buffer_owner.register_buffer(key, value.to(device), persistent=False)
