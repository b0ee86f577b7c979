"""Give each worker a stream on its device: a worker's answers wait for its own work alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from .precision import ComputeSpec

_STREAMS: dict[tuple[torch.device, int], Any] = {}
"""By device and worker. Later runs take the same: torch keeps the memory that a stream has freed for this stream."""


def stream_of(spec: ComputeSpec) -> Any:
    """Return a worker's stream on its device; None on a processor, where work is done at once."""
    if spec.device.type != "cuda":
        return None
    key = spec.device, spec.worker
    if key not in _STREAMS:
        _STREAMS[key] = torch.cuda.Stream(spec.device)  # type: ignore[no-untyped-call]
    return _STREAMS[key]


class DeviceStream(NamedTuple):
    """A worker's device, and its stream there."""

    device: torch.device
    stream: Any

    @classmethod
    def dealt(cls, spec: ComputeSpec) -> Callable[[], DeviceStream]:
        """Return a function that gives each worker its own, on the devices in turn."""
        deal = spec.dealt()
        return lambda: cls((mine := deal()).device, stream_of(mine))

    def working(self) -> AbstractContextManager[object]:
        """Return the context in which tensors of this stream may be used."""
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()
