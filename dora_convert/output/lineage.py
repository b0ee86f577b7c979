"""Tell which adapter was trained on which: by the bases that adapters name, and by the receipts of merges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..adapters import Adapter, Full, LowRank, Rows, Update
from ..errors import DoraConvertError
from ..sources.inputs import strangers
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import RECORD
from ..storage.refs import Source, local_path
from .receipt import MergedSource, Receipt, read_receipt
from .side_files import PREVIOUS


def doubts(base: Checkpoint, adapters: Sequence[Adapter], method: str = "sum") -> Iterator[str]:
    """Yield warnings about adapters that name another base than BASE: chains, and bases that no receipt explains."""
    yield from chains(base, adapters, method)
    yield from repeated(adapters)
    merged = _receipts(base.root)
    for adapter in strangers(base, adapters):
        if not (_is_result(adapter, merged) or any(_is_trained_on(adapter, first) for first in adapters)):
            name = base.source.repo or base.source.name
            kind = f" ({', '.join(sorted(base.model_types))})" if base.model_types else ""
            yield f"{adapter.source.name} was trained on {adapter.base}; BASE is {name}{kind}"


def repeated(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield a warning for each adapter that is given more than once."""
    counts = Counter(tuple(path.resolve() for path in adapter.files) for adapter in adapters)
    for adapter in adapters:
        if (count := counts.pop(tuple(path.resolve() for path in adapter.files), 1)) > 1:
            yield f"{adapter.source.name} is given {count} times, and counts as often"


def chains(base: Checkpoint, adapters: Sequence[Adapter], method: str = "sum") -> Iterator[str]:
    """Yield a warning for each adapter that was trained on the merge of another, if a merge treats it otherwise.

    A chain in the order of the training is as it should be.
    """
    is_sum = method in ("sum", "linear")
    for place, first in enumerate(adapters):
        for later in strangers(base, adapters):
            if not _is_trained_on(later, first) or not _share_modules(first, later):
                continue
            one, two = first.source.name, later.source.name
            if method == "chain":
                if adapters.index(later) < place:
                    yield f"the chain is in another order than the training: {two} was trained on what {one} makes"
            else:
                yield _looks_like_a_chain(one, two, method, differs=not is_sum or _reads_base(later, first))


def _looks_like_a_chain(one: str, two: str, method: str, *, differs: bool) -> str:
    """Return the warning about an adapter that was trained on the merge of another."""
    trained = f"this looks like a chain: {two} was trained on what {one} makes of its base"
    if not differs:
        return f"{trained}. LoRAs give the same weights either way; --method chain says what was done"
    combined = f"--method {method} combines" if method != "sum" else "Merged at once, they are a sum, which takes"
    return (
        f"{trained}. {combined} the changes of the unmerged base, and the result differs from the chain. "
        f"--method chain merges {one} first, then {two} on the result"
    )


def _changed_by(adapter: Adapter) -> set[str]:
    """Return the weights that an adapter changes, by name."""
    return {name for change in adapter.changes for name in (change.target, *change.among)}


def _share_modules(first: Adapter, later: Adapter) -> bool:
    """Return True if two adapters change one weight."""
    return not _changed_by(first).isdisjoint(_changed_by(later))


def _reads_base(later: Adapter, first: Adapter) -> bool:
    """Return True if an update of `later` depends on the weight that it changes, and `first` changes that weight.

    The norms of a DoRA do, and so does a start such as PiSSA's. A LoRA adds the same to any weight.
    """
    changed = _changed_by(first)
    return any(changed & {change.target, *change.among} for change in later.changes if _depends(change.update))


def _depends(update: Update) -> bool:
    """Return True if the result is more than the weight and an addend, or than a value of its own."""
    if isinstance(update, LowRank | Full) and update.start:
        return True
    return not (isinstance(update, Full | Rows) or hasattr(update, "scale"))


def _is_trained_on(later: Adapter, first: Adapter) -> bool:
    """Return True if an adapter names another one as its base, by path or name, or a merge of that one."""
    if later is first or not later.base:
        return False
    folder = _folder(later.base)
    if folder and folder.resolve() == first.source.path.resolve():
        return True
    merged = [adapter for receipt in _receipts(folder) for adapter in receipt.adapters]
    if any(adapter.is_in(first.source.path) for adapter in merged):
        return True
    return not merged and _has_name(first.source, later.base)


def _is_result(adapter: Adapter, merged: Sequence[Receipt]) -> bool:
    """Return True if an adapter names as its base what BASE is by its receipts.

    Either the merge that BASE is, perhaps in another folder, or the adapter that was merged last.
    """
    if not merged or not adapter.base:
        return False
    folder = _folder(adapter.base)
    for known in _receipts(folder)[:1]:
        return [each.files for each in known.adapters] == [each.files for each in merged[0].adapters] and (
            known.base.hash == merged[0].base.hash
        )
    return any(_has_name(each, adapter.base) or bool(folder and each.is_in(folder)) for each in merged[0].adapters)


def _folder(name: str) -> Path | None:
    """Return the local folder that an adapter names as its base, if there is one."""
    try:
        path = local_path(name, "the base")
    except DoraConvertError:
        return None
    return path if path.is_dir() else None


def _receipts(folder: Path | None) -> list[Receipt]:
    """Return the receipts of the merges that made a checkpoint, the last merge first; none that cannot be read."""
    receipts: list[Receipt] = []
    record = folder / RECORD if folder else None
    try:
        while record and (receipt := read_receipt(record)):
            receipts.append(receipt)
            record /= PREVIOUS
    except DoraConvertError:  # whoever needs the receipt refuses it
        pass
    return receipts


def _has_name(source: Source | MergedSource, name: str) -> bool:
    """Return True if the last part of a name is that of a source's folder or repo."""
    return _last_part(name) in map(_last_part, filter(None, (source.name, source.repo)))


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
