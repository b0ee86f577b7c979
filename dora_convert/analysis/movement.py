"""Measure one module: ΔM, ΔD, the size and the rank of ΔW, and the loss by rounding, block by block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..engine.device_buffers import DeviceBuffers
from ..engine.factors import LoadedEdit, apply_edits
from ..engine.precision import TORCH
from ..engine.tensor import SourceValues, measure
from ..errors import NumericalError
from ..maths import lora as maths
from .modules import AnalysedModule
from .spectrum import Spectrum, start_spectrum
from .statistics import quantiles


class ModuleBlocks:
    """Blocks of W and W' of one module."""

    def __init__(self, module: AnalysedModule, buffers: DeviceBuffers) -> None:
        self.module, self.buffers = module, buffers
        self._item = module.item
        self.edits = [LoadedEdit.load(edit, buffers) for edit in self._item.edits]
        self._values = SourceValues(self._item, buffers)
        measure(self._item, self.edits, self._values, buffers)

    def pair(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return some rows of W and W', (rows, columns) each; the next call overwrites them."""
        item, buffers = self._item, self.buffers
        raw = buffers.raw(item.source, start, stop)
        before = raw if item.source is item.base else buffers.raw(self.module.before, start, stop, "base")
        W = buffers.scratch("before", before.shape, buffers.spec.compute).copy_(before.to(buffers.spec.device))
        return W, apply_edits(self._values.block(raw, start, stop), self.edits, start, stop)

    def change(self, start: int, stop: int, buffer: str = "delta") -> tuple[Tensor, Tensor, Tensor]:
        """Return some rows of W, W' and ΔW; `buffer` names the memory of ΔW."""
        W, after = self.pair(start, stop)
        D = torch.sub(after, W, out=self.buffers.scratch(buffer, W.shape, W.dtype))
        if not maths.all_finite(D):
            raise NumericalError(
                f"{self._item.name}: W or W' holds NaN or Inf.", hint="--exclude leaves the module out"
            )
        return W, after, D


class OutputNorms:
    """‖w‖, ‖w'‖ and ‖Δw‖ of each output, of rows or of columns; columns of experts end with the expert."""

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._squares: list[Tensor] = []
        self._norms: list[Tensor] = []

    def add(self, matrices: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add a block of rows of W, W' and ΔW."""
        norms = torch.stack([maths.norms(each, axis=self._axis) for each in matrices])
        if self._axis == 1:
            self._norms.append(norms)
        else:
            self._squares = [self._squares[0] + norms.square_()] if self._squares else [norms.square_()]

    def end(self) -> None:
        """End a matrix."""
        self._norms += [each.sqrt_() for each in self._squares]
        self._squares = []

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ‖w‖, ‖w'‖ and ‖Δw‖ of all outputs, in float64 on the host."""
        before, after, change = torch.cat(self._norms, dim=1).double().cpu()
        return before, after, change


def movement(before: Tensor, after: Tensor, change: Tensor) -> tuple[float, float]:
    """Return ΔM and ΔD of outputs with these norms.

    1 − cos = (‖Δw‖² − (‖w'‖ − ‖w‖)²)/(2·‖w‖·‖w'‖), which does not cancel where vectors hardly turn. A vector
    that is zero before or after, and not both, counts as turned by a right angle.
    """
    grown = after - before
    product = 2 * before * after
    turned = ((change - grown.abs()) * (change + grown.abs()) / product).clamp_(0.0, 2.0)
    turned = torch.where(product > 0, turned, (change > 0).double())
    return float(grown.abs().mean()), float(turned.mean())


def measure_module(module: AnalysedModule, buffers: DeviceBuffers) -> dict[str, Any]:
    """Return the figures of one module, by the names of the report's fields, and sums for totals."""
    blocks = ModuleBlocks(module, buffers)
    outputs = OutputNorms(0 if module.turned else 1)
    columns = OutputNorms(0) if module.embedding else None
    spectrum = start_spectrum(module, blocks.edits, buffers)
    height, error = module.rows // module.experts, 0.0
    for start, stop in module.spans():
        W, after, D = blocks.change(start, stop)
        outputs.add((W, after, D))
        if columns:
            columns.add((W, after, D))
        spectrum.add(D, start, stop)
        error += _rounding(after, D, module, buffers)
        if stop % height == 0:
            outputs.end()
            spectrum.end()
    facts = _facts(outputs, spectrum, error)
    if columns:
        columns.end()
        facts["column_magnitude"], facts["column_direction"] = movement(*columns.result())
    return facts


def _rounding(after: Tensor, scratch: Tensor, module: AnalysedModule, buffers: DeviceBuffers) -> float:
    """Return ‖round(W') − W'‖² of a block for the base's dtype; `scratch` is overwritten."""
    dtype = TORCH[module.before.dtype]
    single = buffers.scratch("single", after.shape, torch.float32)
    rounded = maths.round_to(after, buffers.scratch("rounded", after.shape, dtype), single)
    return float(torch.linalg.vector_norm(scratch.copy_(rounded).sub_(after)).square())


def _facts(outputs: OutputNorms, spectrum: Spectrum, error: float) -> dict[str, Any]:
    before, after, change = outputs.result()
    delta_magnitude, delta_direction = movement(before, after, change)
    size, moved = float(before.square().sum()), float(change.square().sum())
    return {
        "delta_magnitude": delta_magnitude,
        "delta_direction": delta_direction,
        "relative_change": math.sqrt(moved / size) if size else None,
        "lost": math.sqrt(error / moved) if moved else None,
        "norm": float(before.mean()),
        "norm_ratio": _ratios(before, after),
        **spectrum.result(),
        "squares": (size, moved, error),
    }


def _ratios(before: Tensor, after: Tensor) -> Mapping[str, float] | None:
    """Return the quantiles of ‖w'‖/‖w‖."""
    return quantiles((after / before)[before > 0].tolist())
