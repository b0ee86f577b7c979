"""Compare what two adapters change in one module: the angle between the changes, and opposite signs."""

from __future__ import annotations

import math

import torch

from ..engine.device_buffers import DeviceBuffers
from ..reports.analyze import Collision
from .modules import AnalysedModule
from .movement import ModuleBlocks


def collide(one: AnalysedModule, other: AnalysedModule, buffers: DeviceBuffers) -> Collision:
    """Return the cosine of ΔW₁ and ΔW₂, and the share of elements with opposite signs among those of both.

    TIES (arXiv:2306.01708) elects one sign for such elements.
    """
    first, second = ModuleBlocks(one, buffers), ModuleBlocks(other, buffers)
    sums, conflicts, both = torch.zeros(3, dtype=torch.float64), 0, 0
    for start, stop in one.spans():
        D = first.change(start, stop, "first")[2]
        E = second.change(start, stop)[2]
        products = buffers.scratch("products", D.shape, D.dtype)
        torch.mul(D, E, out=products)
        sums += torch.stack([products.sum(), D.square().sum(), E.square().sum()]).double().cpu()
        signs = products.copy_(D.sign()).mul_(E.sign())
        conflicts += int((signs < 0).sum())
        both += int((signs != 0).sum())
    product, size, other_size = sums.tolist()
    return Collision(
        module=one.name,
        cosine=product / math.sqrt(size) / math.sqrt(other_size) if size and other_size else None,
        sign_conflicts=conflicts / both if both else None,
        elements=both,
    )
