"""Take out of a weight what PiSSA, OLoRA or KaSA took out before training."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters import LowRank, Start
from ..engine.precision import TORCH
from ..plan.item import Item


def rest_of(W: Tensor, low: LowRank, item: Item) -> Tensor:
    """Return a stored weight without its start, in the stored dtype."""
    turned, W = item.edits[0].transposed, W.float()
    rest = without_start(W.T if turned else W, low)
    return (rest.T if turned else rest).contiguous().to(TORCH[item.source.dtype])


def without_start(W: Tensor, low: LowRank) -> Tensor:
    """Return W (out, in), float32, without its start."""
    r = low.rank
    if low.start is Start.OLORA:
        Q, R = torch.linalg.qr(W)
        return W - low.scale * torch.einsum("or,ri->oi", Q[:, :r], R[:r])
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    gone = slice(len(S) - r, None) if low.start is Start.KASA else slice(0, r)
    return W - torch.einsum("or,r,ri->oi", U[:, gone], S[gone], Vh[gone])
