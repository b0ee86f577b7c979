"""Say what a cluster does for us: jobs, which nodes start once and then do task after task.

`RayCluster` is the implementation. Tests use one that pickles, and runs in this process.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import xxhash

from ..errors import DoraConvertError, OutputError, UsageError
from ..settings import Settings, __version__
from ..storage.refs import HUB

if TYPE_CHECKING:
    from ..engine.precision import ComputeSpec

Work = TypeVar("Work")
Result = TypeVar("Result")
Work_contra = TypeVar("Work_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)
TASK_BYTES = 32 << 20
"""Least bytes of the tensors of one task: much more work than the call, and little to lose."""
ROUNDS = 2
"""A task takes at most this part of the work left for each slot: large tasks first, and small ones at the end."""
INSTRUCTIONS = {"AVX512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}, "AVX2": {"avx2", "fma"}}
"""The flags of a processor that torch asks for before it uses an instruction set, the widest first."""
HEAD_BYTES = 1 << 16
"""Bytes at a file's begin that tell whether two nodes see the same file."""


def task_bytes(left: int, slots: int) -> int:
    """Return the most bytes of the next task, by the bytes that are left: fewer calls, and a short end."""
    return max(TASK_BYTES, left // (ROUNDS * max(1, slots)))


def ranges(sizes: Sequence[int], slots: int) -> Iterator[range]:
    """Yield ranges of numbers, one after the other, whose sizes add up to a task's bytes."""
    start = total = 0
    left = sum(sizes)
    for number, size in enumerate(sizes):
        if number > start and total + size > task_bytes(left, slots):
            yield range(start, number)
            start, total, left = number, 0, left - total
        total += size
    if sizes:
        yield range(start, len(sizes))


class NodeJob(Protocol[Work_contra, Result_co]):
    """Everything that tasks of one kind need, as data."""

    def start(self) -> Callable[[Work_contra], Result_co]:
        """Return the function that does one task, maybe a `NodeWork`; called once in each process of a node."""


class NodeWork(Generic[Work, Result]):
    """Does the tasks of a job in one process, and holds what must be closed at the end."""

    def __init__(self, do: Callable[[Work], Result], stack: ExitStack) -> None:
        self._do, self._stack = do, stack

    def __call__(self, task: Work) -> Result:
        """Do a task."""
        return self._do(task)

    def stop(self) -> None:
        """End the task at work soon; by default at its own end."""

    def close(self) -> None:
        """Close files, and remove what does not stay; called between two tasks."""
        self._stack.close()


class Cluster(Protocol):
    """Nodes that do tasks."""

    def map(
        self, job: NodeJob[Work, Result], tasks: Iterable[Work], *, withdraw: Callable[[], None] | None = None
    ) -> Iterator[tuple[Work, Result]]:
        """Yield each task with its result, as tasks end; a task of a lost node is done again elsewhere.

        Raises the first error of a task. After an error, `withdraw` makes further tasks fail, and no task runs
        after the end of the iterator. Without `withdraw` some may.
        """

    def ask(
        self, question: Callable[[], NodeFacts], late: Callable[[], None] | None = None
    ) -> Callable[[], list[NodeFacts]]:
        """Ask every node that works; return a function that waits for the answers.

        A node that takes the place of a lost one calls `late`, which raises UsageError if it cannot.
        """

    @property
    def slots(self) -> int:
        """The number of tasks that run at once."""

    @property
    def gpus(self) -> int:
        """The number of GPUs of all nodes."""


@dataclass(frozen=True)
class NodeFacts:
    """Facts about one node that decide if it can take part."""

    name: str
    versions: tuple[str, ...]
    """Of this package, torch and Python."""
    processor: str
    """The instruction set that torch uses."""
    missing: tuple[str, ...]
    """Paths that the node does not see, or sees other files at."""
    refused: str = ""
    """The reason why an object store, or the Hub, does not answer the node as it answers this machine."""


@dataclass(frozen=True)
class NodeCheck:
    """Asks a node for its facts, and if it sees the files that this machine sees."""

    heads: dict[str, str]
    """For each path, a hash of the file's size and its first bytes."""
    stores: Mapping[str, str | None] = field(default_factory=dict)
    """For each folder in a store, the hash of its listing if it is an input; a repo on the Hub is an output."""

    def __call__(self) -> NodeFacts:
        """Return the facts of the node that this is called on."""
        missing = [path for path, head in self.heads.items() if _head(path) != head]
        return NodeFacts(node_name(), _versions(), _processor(), tuple(missing), _refusal(self.stores))


def node_name() -> str:
    """Return the name of this machine, for messages."""
    return socket.gethostname()


def _refusal(stores: Mapping[str, str | None]) -> str:
    """Return the reason why a store, or the Hub, does not answer this node as it should; empty if all do."""
    for url, wanted in stores.items():
        try:
            if url.startswith(HUB):
                from ..sources.hub_client import refuse_unknown

                refuse_unknown(url.removeprefix(HUB))
                continue
            from ..sources.object_store import ObjectStore, listing_hash

            files = ObjectStore(url).files()
        except DoraConvertError as error:
            return f"{error.message} ({error.hint})" if error.hint else error.message
        if wanted and listing_hash(files) != wanted:
            return f"{url} holds other files than this machine finds there."
    return ""


def _versions() -> tuple[str, ...]:
    python = platform.python_version().rpartition(".")[0]
    return (f"dora-convert {__version__}", f"torch {version('torch')}", f"Python {python}")


@dataclass(frozen=True)
class LateCheck:
    """Checks a node that takes part only after another one was lost."""

    check: NodeCheck
    versions: tuple[str, ...] = field(default_factory=_versions)

    def __call__(self) -> None:
        """Raise UsageError if the node that this is called on cannot take part."""
        _refuse_nodes([self.check()], None, self.versions)


@cache
def _processor() -> str:
    """Return the instruction set that torch would use; torch itself is not imported for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set[str]())
    sets = [name for name, needed in INSTRUCTIONS.items() if needed <= flags]
    return sets[0] if sets else platform.machine()


def _head(path: str) -> str:
    """Return a hash of a file's size and first bytes; empty if the file cannot be read."""
    try:
        with Path(path).open("rb") as file:
            digest = xxhash.xxh3_128(file.read(HEAD_BYTES))
            digest.update(str(file.seek(0, 2)).encode())
    except OSError:
        return ""
    return digest.hexdigest()


@contextmanager
def asked_nodes(
    cluster: Cluster, inputs: Iterable[Path], token: Path | None, settings: Settings, stores: Mapping[str, str | None]
) -> Iterator[Callable[[], None]]:
    """Ask all nodes for their versions, and if they see the inputs and the output's folder.

    `stores` are folders in object stores, and repos on the Hub, that every node must reach.
    Yields a function that waits for the answers, and raises UsageError if a node cannot take part. `token` is a file
    beside the output that this function writes and removes; None without an output.
    """
    tokens = [token] if token else []
    try:
        for path in tokens:
            _write(path)
        heads = {str(path): _head(str(path)) for path in (*inputs, *tokens)}
        known = {path: head for path, head in heads.items() if path not in set(map(str, tokens))}
        answers = cluster.ask(NodeCheck(heads, stores), LateCheck(NodeCheck(known, stores)))
        yield lambda: _check_answers(answers(), token, settings)
    finally:
        for path in tokens:
            path.unlink(missing_ok=True)


def _write(token: Path) -> None:
    try:
        token.write_text(token.name, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"OUT cannot be written: {error.filename}: {error.strerror or error}.") from error


def _check_answers(answers: Sequence[NodeFacts], token: Path | None, settings: Settings) -> None:
    """Raise UsageError if a node cannot take part; warn of different processors."""
    if token:
        token.unlink(missing_ok=True)
    _refuse_nodes(answers, token, _versions())
    if len(processors := {facts.processor for facts in (*answers, NodeCheck({})())}) > 1:
        settings.warn(
            f"the nodes have different processors ({', '.join(sorted(processors))}): last bits may depend on "
            "the node that writes a tensor"
        )


def _refuse_nodes(answers: Sequence[NodeFacts], token: Path | None, versions: tuple[str, ...]) -> None:
    """Raise UsageError, naming node and path, for the first node that cannot take part."""
    if not answers:
        raise UsageError("The cluster has no node with a processor.", hint="ray status")
    for facts in answers:
        if facts.versions != versions:
            raise UsageError(
                f"Node {facts.name} has {', '.join(facts.versions)}; the command's machine has {', '.join(versions)}.",
                hint="install the same versions on every node",
            )
    for facts in answers:
        if facts.refused:
            raise UsageError(
                f"Node {facts.name}: {facts.refused}",
                hint="every node needs the store's extra, its address and credentials; for the Hub, HF_TOKEN",
            )
        if token and str(token) in facts.missing:
            raise UsageError(
                f"Node {facts.name} does not see the folder {token.parent}, where OUT is written.",
                hint="name an OUT on a file system that every node has at the same path",
            )
        if facts.missing:
            raise UsageError(
                f"Node {facts.name} does not see {facts.missing[0]} as this machine does"
                + (f", nor {len(facts.missing) - 1} further inputs." if len(facts.missing) > 1 else "."),
                hint="put the inputs on a file system that every node has at the same path",
            )


def choose_for(cluster: Cluster, settings: Settings) -> ComputeSpec:
    """Choose the kind of device and the dtype for all nodes: a GPU for each task if the cluster has GPUs."""
    device, compute = settings.device, settings.compute_dtype
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"--device {device} does not go with --cluster: Ray deals the devices out.", hint="--device cuda, or cpu"
        )
    if device == "cuda" and not cluster.gpus:
        raise UsageError("No node of the cluster has a CUDA device.", hint="ray status")
    import torch

    from ..engine.precision import ComputeSpec

    kind = "cuda" if cluster.gpus and device != "cpu" else "cpu"
    dtype = torch.float64 if compute == "auto" else getattr(torch, compute)
    return ComputeSpec(torch.device(kind), dtype, f"{cluster.gpus} GPUs in the cluster" if cluster.gpus else "cluster")
