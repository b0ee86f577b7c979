"""Compute a whole plan without writing: errors show before a checkpoint is changed in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from ..output.finished import TensorResult
from ..output.shards import Copy, ShardFiles
from ..plan.item import Item
from ..plan.plan import Plan
from ..settings import Settings
from ..storage.journal import Journal
from ..storage.reader import Reader
from ..storage.spool import Segment, Spool
from .executor import Run
from .precision import ComputeSpec
from .tensor import StartMaker


def rehearse(plan: Plan, settings: Settings, spec: ComputeSpec, maker: StartMaker) -> Mapping[str, TensorResult]:
    """Compute every tensor of a plan, and return the results by name."""
    with closing(Reader()) as reader:
        run = Run(
            plan=plan,
            settings=replace(settings, on_progress=None),
            spec=spec,
            shards=NoShards(),
            reader=reader,
            spool=NoSpool(),
            journal=NoJournal(),
            maker=maker,
        )
        run.execute()
    return run.progress.done


class NoShards(ShardFiles):
    """Shards that take nothing."""

    def __init__(self) -> None: ...

    def copies(self, plan: Plan) -> Iterator[Copy]:  # noqa: ARG002
        """Return nothing: copies cannot fail in arithmetic."""
        return iter(())

    def write(self, item: Item, offset: int, data: memoryview) -> None:
        """Write nothing."""

    def shard_of(self, item: Item) -> str:  # noqa: ARG002
        """Return no name."""
        return ""

    def path(self, shard: str) -> Path:  # noqa: ARG002
        """Return no file."""
        return Path()


class NoSpool(Spool):
    """A spool that keeps nothing."""

    path = Path()

    def __init__(self) -> None: ...

    def add(self, data: bytes | memoryview) -> Segment:
        """Keep nothing."""
        return Segment(0, len(data))


class NoJournal(Journal):
    """A journal that keeps nothing."""

    def __init__(self) -> None: ...

    def add(self, line: object, files: Collection[Path], then: object = None) -> None:
        """Enter nothing."""
