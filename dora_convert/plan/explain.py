"""Put into words what is wrong with a merge, or may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from ..adapters import Adapter, Full
from ..errors import Fault, PlanError
from ..naming.families import PAST_LORA
from ..storage.checkpoint import Checkpoint
from .item import Item
from .plan import Entry, Options

LACKING = "the config says that it was trained, and the adapter has no tensor of it"
SHOWN = 10
"""Names in a warning."""


def refuse(
    faults: Sequence[Fault], beside: Mapping[str, Sequence[Full]], base: Checkpoint, adapters: Sequence[Adapter]
) -> NoReturn:
    """Raise PlanError with all faults; some are of updates from files `beside` the adapters."""
    contradictory = any(adapter.faults for adapter in adapters)
    wrong = "contradict themselves, or " if contradictory else ""
    count = sum(map(len, beside.values()))
    only = count == len(faults) and len(beside) == 1
    what = f"tensors of {next(iter(beside))}" if only else f"adapter tensors{formats_of(adapters)}"
    hints = [f"--ignore-file {name} merges without it" for name in beside]
    most = 2 * len(faults) >= sum(len(adapter.tensors) for adapter in adapters)
    if count < len(faults) and most and not contradictory:
        hints.insert(0, other_base(base, adapters))
    raise PlanError(
        f"{len(faults)} {what} {wrong}have no place in the base.", faults=faults, hint="; ".join(hints) or None
    )


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


def warn_of_missing(adapters: Sequence[Adapter], missing: Sequence[Sequence[str]], options: Options) -> tuple[str, ...]:
    """Return a warning for each adapter that is not complete; PlanError if the caller is strict."""
    if options.strict and any(missing):
        names = ", ".join(adapter.source.name for adapter, lacking in zip(adapters, missing, strict=True) if lacking)
        raise PlanError(
            f"{names} lacks what its config says was trained.",
            faults=[Fault(name, LACKING) for lacking in missing for name in lacking],
            hint="without --strict these weights stay as in the base",
        )
    return tuple(
        f"{adapter.source.name} lacks {len(lacking)} modules that its config says were trained: "
        f"{', '.join(name.removesuffix('.weight') for name in lacking[:SHOWN])}{' …' if lacking[SHOWN:] else ''}. "
        "They stay as in the base; --strict makes this an error."
        for adapter, lacking in zip(adapters, missing, strict=True)
        if lacking
    )


def warn_of_unmatched(names: Sequence[str]) -> str:
    """Return a warning about adapter tensors that are left out, as the caller allows."""
    return (
        f"{len(names)} adapter tensors have no place in the base, and are left out: "
        f"{', '.join(names[:SHOWN])}{' …' if names[SHOWN:] else ''}"
    )


def entries_of_missing(missing: Sequence[Sequence[str]]) -> list[Entry]:
    """Return the ledger's entries for the weights that adapters lack."""
    return [Entry(name, "missing", (), LACKING) for names in missing for name in names]


def warn_of_past_lora(base: Checkpoint, items: Mapping[str, Item]) -> Iterator[str]:
    """Yield a warning for each layer that a merge changes and that training could not change."""
    for kind in sorted(base.model_types & PAST_LORA.keys()):
        ends = tuple(f".{module}.weight" for module in PAST_LORA[kind])
        found = [name.removesuffix(".weight") for name, item in items.items() if item.edits and name.endswith(ends)]
        if found:
            shown = ", ".join(found[:SHOWN]) + (" …" if found[SHOWN:] else "")
            yield (
                f"{kind} reads the weights of {shown} past their LoRA: "
                "training changed nothing there, and the merge does, as PEFT's merge does. --exclude leaves them out."
            )
