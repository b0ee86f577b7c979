"""A run that writes nothing: what cannot be made shows before a checkpoint is changed in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import closing

from ..output.finished import Progress, TensorResult
from ..output.shards import Copy, ShardFiles
from ..plan.item import Item
from ..plan.plan import Plan
from ..settings import Settings
from ..storage.journal import Journal
from ..storage.reader import Reader
from ..storage.spool import Segment, Spool
from .executor import Budget, Run
from .precision import ComputeSpec
from .tensor import MakeTensor


def rehearse(
    plan: Plan, settings: Settings, spec: ComputeSpec, make: MakeTensor
) -> Mapping[str, TensorResult]:
    """Compute every tensor of a plan; what is known of each."""
    with closing(Reader()) as reader:
        budget, progress = Budget(settings.max_memory), Progress()
        sinks = NoShards(), reader, NoSpool(), NoJournal()
        run = Run(plan, *sinks, spec, budget, make, None, None, progress)
        run.execute(settings.workers)
    return progress.done


class NoShards(ShardFiles):
    """Shards that are not there."""

    def __init__(self) -> None: ...

    def copies(self, plan: Plan) -> Iterator[Copy]:  # noqa: ARG002
        """Nothing to copy."""
        return iter(())

    def write(self, item: Item, offset: int, data: memoryview) -> None:
        """Nothing is written."""

    def shard_of(self, item: Item) -> str:  # noqa: ARG002
        """No file."""
        return ""

    def descriptor(self, shard: str) -> int:  # noqa: ARG002
        """No file."""
        return -1


class NoSpool(Spool):
    """A spool that keeps nothing."""

    descriptor = -1

    def __init__(self) -> None: ...

    def add(self, data: bytes | memoryview) -> Segment:  # noqa: ARG002
        """Nothing is kept."""
        return Segment(0, 0)


class NoJournal(Journal):
    """A journal that nothing is entered into."""

    def __init__(self) -> None: ...

    def add(self, line: object, descriptors: Collection[int], then: object = None) -> None:
        """Nothing is entered."""
