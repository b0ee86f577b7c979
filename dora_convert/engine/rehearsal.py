"""Compute a whole plan without writing: errors show before a checkpoint is changed in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..output.finished import TensorResult
from ..output.shards import Copy, ShardFiles
from ..plan.item import Item
from ..plan.plan import Plan
from ..settings import Settings
from ..storage.journal import Journal
from ..storage.reader import Reader
from ..storage.spool import Segment, Spool
from .precision import ComputeSpec
from .run import Run

if TYPE_CHECKING:
    from .protocols import StartMaker


def rehearse(
    plan: Plan, settings: Settings, spec: ComputeSpec, maker: StartMaker, hashed: Collection[str] = ()
) -> Mapping[str, TensorResult]:
    """Compute every tensor of a plan, hash those in `hashed`, and return the results by name."""
    with closing(Reader()) as reader:
        run = Run(
            plan=plan,
            settings=replace(settings, on_progress=None),
            spec=spec,
            shards=_NoShards(),
            reader=reader,
            spool=NoSpool(),
            journal=_NoJournal(),
            maker=maker,
            hashed=hashed,
        )
        run.execute()
    return run.progress.done


class _NoShards(ShardFiles):
    """Shards that take nothing."""

    def __init__(self) -> None: ...

    def copies(self, plan: Plan) -> Iterator[Copy]:  # noqa: ARG002 - copies cannot fail in arithmetic
        return iter(())

    def write(self, item: Item, offset: int, data: memoryview) -> None: ...

    def write_whole(self, items: Sequence[Item], data: memoryview) -> None: ...

    def shard_of(self, item: Item) -> str:  # noqa: ARG002
        return ""

    def path(self, shard: str) -> Path:  # noqa: ARG002
        return Path()


class NoSpool(Spool):
    """A spool that keeps nothing."""

    path = Path()

    def __init__(self) -> None: ...

    def add(self, data: bytes | memoryview) -> Segment:
        """Forget the bytes."""
        return Segment(0, len(data))


class _NoJournal(Journal):
    """A journal that keeps nothing."""

    def __init__(self) -> None: ...

    def add_all(self, lines: object, files: Collection[Path]) -> None: ...
