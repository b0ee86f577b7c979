"""Say what options for quantised bases, and adapters of quantised trainings, mean for a base that is dense."""

from __future__ import annotations

from collections.abc import Sequence

from ...adapters import Adapter
from ...settings import Settings
from ...sources.inputs import QUANTISED_NAME
from ...storage.checkpoint import Checkpoint

IDLE = {"all": "--dequantize", "touched": "--dequantize-touched", "again": "--requantize"}
"""Options that change nothing for a base that is not quantised, by what they make of one that is."""


def tell_of_dense_base(base: Checkpoint, adapters: Sequence[Adapter], quantised: str, settings: Settings) -> None:
    """Warn of an option for quantised bases; name the other choice for adapters that were trained on one."""
    if quantised in IDLE:
        settings.warn(f"{IDLE[quantised]} changes nothing: {base.source.name} is not quantised")
    if quantised:
        return
    for adapter in adapters:
        if not (adapter.base and QUANTISED_NAME.search(adapter.base)):
            continue
        settings.notify(
            f"{adapter.source.name} was trained on {adapter.base}, which is quantised: merging onto the 16-bit weights "
            "keeps their quality; --base-as nf4 merges onto the weights that training saw, and keeps the outputs of "
            "the trained model (docs/qlora.md)"
        )
