"""Find the accelerators that `--device` names."""

from __future__ import annotations

import torch

from ..errors import UsageError


def accelerators(names: str) -> tuple[tuple[torch.device, ...], str]:
    """Return the devices of a list such as cuda:0,1 and the reason for the choice; auto stands for all of CUDA.

    Raises UsageError for a device that this machine does not have, and for cards of two models: an element may
    be rounded otherwise on another card, and bytes would depend on the worker.
    """
    if names == "auto":
        return _all_alike()
    devices = tuple(_device(name, names) for name in spelled_out(names))
    models = {torch.cuda.get_device_name(device) for device in devices if device.type == "cuda"}
    if len(models) > 1:
        raise UsageError(
            f"--device {names}: {' and '.join(sorted(models))} together would give bytes that depend on the card.",
            hint="name cards of one model",
        )
    return devices, "as asked"


def spelled_out(names: str) -> list[str]:
    """Return the devices of a list one by one: a bare number is a CUDA device."""
    return [f"cuda:{name}" if name.isdecimal() else name for name in names.split(",")]


def _all_alike() -> tuple[tuple[torch.device, ...], str]:
    """Return the current CUDA device, and all others of its model."""
    first, count = torch.cuda.current_device(), torch.cuda.device_count()
    model = torch.cuda.get_device_name(first)
    alike = [number for number in range(count) if torch.cuda.get_device_name(number) == model]
    alike.sort(key=lambda number: number != first)
    other = f"; {count - len(alike)} of another model left out" if len(alike) < count else ""
    found = "CUDA device found" if len(alike) == 1 else f"{len(alike)} CUDA devices found"
    return tuple(torch.device("cuda", number) for number in alike), f"{found}{other}"


def _device(name: str, names: str) -> torch.device:
    """Return one device."""
    if name.startswith("cuda"):
        return _cuda_device(int(name.partition(":")[2] or 0), names)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {names}: this machine has no mps device.")
    return torch.device(name)


def _cuda_device(index: int, names: str) -> torch.device:
    """Return a CUDA device by its number."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index < count:
        return torch.device("cuda", index)
    is_cpu = not (torch.version.cuda or torch.version.hip)
    why = f": torch {torch.__version__} is a CPU build" if is_cpu else ""
    raise UsageError(
        f"--device {names}: this machine has {count} usable CUDA devices{why}.",
        hint="install a build with CUDA: https://pytorch.org/get-started/locally" if is_cpu else None,
    )


def model_of(device: torch.device) -> str:
    """Return the model of a card, which decides the last bits; the type of a device that is not in this machine."""
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else device.type
