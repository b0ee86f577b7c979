"""Tell of a base that is not quantised, where an option or an adapter is for a quantised one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...option_table import QUANTISED
from ...settings import Settings
from ...storage.refs import QUANTISED_NAME

if TYPE_CHECKING:
    from ...adapters import Adapter
    from ...storage.checkpoint import Checkpoint


def tell_of_dense_base(base: Checkpoint, adapters: Sequence[Adapter], quantised: str, settings: Settings) -> None:
    """Warn of an option for quantised bases; name the other choice for adapters that were trained on one."""
    if quantised in QUANTISED:
        settings.warn(f"{QUANTISED[quantised]} changes nothing: {base.source.name} is not quantised")
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
