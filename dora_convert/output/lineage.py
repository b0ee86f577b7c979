"""Tell which adapter was trained on which: by the bases that adapters name, and by the receipts of merges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..adapters import Adapter, Decomposed, Full, LowRank
from ..errors import DoraConvertError
from ..sources.inputs import strangers
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import RECORD
from ..storage.refs import Source, local_path
from .receipt import MergedSource, Receipt, read_receipt
from .side_files import PREVIOUS


def doubts(base: Checkpoint, adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield warnings about adapters that name another base than BASE: chains, and bases that no receipt explains."""
    yield from chains(base, adapters)
    merged = _receipts(base.root)
    for adapter in strangers(base, adapters):
        if not (_is_result(adapter, merged) or any(_is_trained_on(adapter, first) for first in adapters)):
            name = base.source.repo or base.source.name
            kind = f" ({', '.join(sorted(base.model_types))})" if base.model_types else ""
            yield f"{adapter.source.name} was trained on {adapter.base}; BASE is {name}{kind}"


def chains(base: Checkpoint, adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield a warning for each adapter that was trained on the merge of another, if their sum differs from that."""
    for first in adapters:
        for later in strangers(base, adapters):
            if _is_trained_on(later, first) and _reads_base(later, first):
                one, two = first.source.name, later.source.name
                yield (
                    f"this looks like a chain: {two} was trained on what {one} makes of its base. Merged at once, "
                    f"they are a sum, and the sum differs from the chain. Merge {one} first, then {two} into the "
                    f"result: dora-convert merge BASE {one} MERGED; dora-convert merge MERGED {two} OUT"
                )


def _reads_base(later: Adapter, first: Adapter) -> bool:
    """Return True if an update of `later` depends on the weight that it changes, and `first` changes that weight.

    The norms of a DoRA do, and so does a start such as PiSSA's. A LoRA adds the same to any weight.
    """
    changed = {name for change in first.changes for name in (change.target, *change.among)}
    return any(
        changed & {change.target, *change.among}
        for change in later.changes
        if isinstance(change.update, Decomposed) or (isinstance(change.update, LowRank | Full) and change.update.start)
    )


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
