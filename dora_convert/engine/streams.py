"""Give each worker a stream on its device: a worker's answers wait for its own work alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, NamedTuple

import torch

from .precision import ComputeSpec

_STREAMS: dict[tuple[torch.device, int], Any] = {}
"""By device and worker. Later runs take the same: torch keeps the memory that a stream has freed for this stream."""


def stream_of(device: torch.device, worker: int) -> Any:
    """Return a worker's stream on its device; None on a processor, where work is done at once."""
    if device.type != "cuda":
        return None
    if (device, worker) not in _STREAMS:
        _STREAMS[device, worker] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _STREAMS[device, worker]


class DeviceStream(NamedTuple):
    """A worker's device, and its stream there."""

    device: torch.device
    stream: Any

    @classmethod
    def dealt(cls, spec: ComputeSpec) -> Callable[[], DeviceStream]:
        """Return a function that gives each worker its own, on the devices in turn."""
        deal, numbers = spec.dealt(), count()
        return lambda: cls((mine := deal()).device, stream_of(mine.device, next(numbers)))

    def working(self) -> AbstractContextManager[object]:
        """Return the context in which tensors of this stream may be used."""
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()
