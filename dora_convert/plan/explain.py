"""Say what base and adapters are, for the error that they do not fit."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters import Adapter
from ..storage.checkpoint import Checkpoint


def formats_of(adapters: Sequence[Adapter]) -> str:
    """Return the formats of adapters that are not PEFT's, in brackets."""
    names = {f"{each.format}, by {each.maker}" if each.maker else each.format for each in adapters}
    return f" ({'; '.join(sorted(names))})" if names != {"peft"} else ""


def other_base(base: Checkpoint, adapters: Sequence[Adapter]) -> str:
    """Return a hint for adapters of which most tensors do not fit."""
    kind = (base.config or {}).get("model_type")
    names = [adapter.base for adapter in adapters if adapter.base and adapter.base != base.source.name]
    facts = [f"the adapter names {names[0]}"] if names else []
    facts += [f"BASE is a {kind} model"] if isinstance(kind, str) else []
    return "is this the base that the adapter was trained on?" + (f" {', '.join(facts)}" if facts else "")
