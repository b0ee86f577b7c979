"""Merge on a Ray cluster whose nodes share no folder, from and to a store that an emulator plays; lose a node, the driver.

    python -m tests.oracles.cluster_stores [s3 gs az] [--cases plain lost_node …]

Needs the extra `[ray]`, a store's extra and its emulator, Linux and root: nodes run in mount namespaces in which the
driver's folders are empty. `make cluster` runs it. Every case must end with the bytes of a local merge.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ray.cluster_utils import Cluster

from ..emulators import Bucket, emulated
from . import cluster as on_cluster
from .stores import run, same_weights, say, synthetic

LAYERS, NODES = 2, 2


@contextmanager
def nodes(
    hidden: Path, count: int = NODES, prefix: str = ""
) -> Iterator[tuple[Cluster, list[subprocess.Popen[bytes]]]]:
    """Start a head without processors, and nodes in which a folder is empty; yield the cluster and the processes."""
    head = {"num_cpus": 0, "object_store_memory": on_cluster.STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        with ExitStack() as stack:
            found = []
            for number in range(count):
                home = shlex.quote(str(hidden.parent / f"node-{number}"))
                hide = f"export HF_HOME={home}; {prefix} hostname node-{number}; mount -t tmpfs none {shlex.quote(str(hidden))}"
                found.append(stack.enter_context(on_cluster.odd_node(cluster, hide)))
            yield cluster, found
    finally:
        cluster.shutdown()


class Cases:
    """The cases, each in a cluster of its own."""

    def __init__(self, bucket: Bucket, folder: Path) -> None:
        self.bucket, self.local, self.hidden = bucket, folder / "local", folder / "driver"
        base, adapter = bucket.upload(folder / "base", "base"), bucket.upload(folder / "dora", "adapter")
        self.words = ["merge", base, adapter, f"{bucket.url}/out", "--cluster", "auto"]

    def plain(self, cluster: Cluster, _: list) -> str:
        out, errors = run([*self.words, "--json"], RAY_ADDRESS=cluster.address)
        del out
        return next(line for line in errors.splitlines() if line.startswith("cluster:"))

    def lost_node(self, cluster: Cluster, processes: list) -> str:
        """A node is gone after the first shard has come."""
        process = on_cluster.start(self.words, cluster.address)
        done = self._wait(process, 1)
        os.killpg(processes[0].pid, signal.SIGKILL)
        on_cluster.finish(process)
        return f"lost after {done} shards, went on"

    def killed_driver(self, cluster: Cluster, _: list) -> str:
        process = on_cluster.start(self.words, cluster.address)
        while not self._entered():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        before = self.shards()
        _, errors = run(self.words, RAY_ADDRESS=cluster.address)
        after, notice = self.shards(), next(line for line in errors.splitlines() if "resumed" in line)
        kept = sum(after[name] == tag for name, tag in before.items())
        assert kept, (before, after)
        return f"{len(before)} shards there, {kept} not sent again; {notice}"

    def interrupted(self, cluster: Cluster, _: list) -> str:
        process = on_cluster.start(self.words, cluster.address)
        self._wait(process, 1)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        errors = on_cluster.finish(process, 130)
        assert "same command" in errors, errors
        seconds = time.monotonic() - begun
        assert seconds < 30, seconds
        run(self.words, RAY_ADDRESS=cluster.address)
        return f"ended after {seconds:.1f} s, resumed"

    def _entered(self) -> int:
        """Return the number of lines in the driver's journal, without the key."""
        journals = self.hidden.glob("dora_convert/merges/*/model.partial/dora_convert/journal.jsonl")
        return sum(len(path.read_bytes().splitlines()) - 1 for path in journals)

    def _wait(self, process: subprocess.Popen[str], count: int) -> int:
        while len(self.shards()) < count:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        return len(self.shards())

    def shards(self) -> dict[str, object]:
        return {name: tag for name, tag in self.bucket.files("out").items() if name.startswith("model-")}


def no_credentials(bucket: Bucket, folder: Path) -> None:
    """Nodes without credentials are named before anything is written."""
    cases = Cases(bucket, folder)
    prefix = "".join(f"export {name}={shlex.quote(value)}; " for name, value in bucket.nobody.items())
    with nodes(cases.hidden, 1, prefix) as (cluster, _):
        _, errors = run(cases.words, 2, RAY_ADDRESS=cluster.address)
    assert "Node node-0" in errors, errors
    assert not bucket.files("out")
    say(next(line for line in errors.splitlines() if line.startswith("Error")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("schemes", nargs="*", default=["s3"])
    names = [name for name, case in vars(Cases).items() if callable(case) and name[0] != "_" and name != "shards"]
    parser.add_argument("--cases", nargs="+", default=names)
    chosen = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
    with tempfile.TemporaryDirectory(prefix="dora-convert-stores-") as name:
        folder = Path(name)
        (folder / "driver").mkdir()
        os.environ["HF_HOME"] = str(folder / "driver")
        shapes = synthetic.shapes(LAYERS, 1000, 0)
        linear = {name: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
        synthetic.write_base(folder / "base", shapes, 6)
        synthetic.write_adapter(folder / "dora", linear, 8, dora=True)
        run(["merge", folder / "base", folder / "dora", folder / "local"])
        for scheme in chosen.schemes:
            for case in chosen.cases:
                with emulated(scheme) as bucket:
                    os.environ |= bucket.variables
                    cases, begun = Cases(bucket, folder), time.monotonic()
                    with nodes(cases.hidden) as (cluster, processes):
                        words = getattr(cases, case)(cluster, processes)
                    same_weights(bucket, "out", cases.local)
                    say(f"{scheme}, {case}: {words} ({time.monotonic() - begun:.1f} s)")
            with emulated(scheme) as bucket:
                os.environ |= bucket.variables
                if bucket.nobody:
                    no_credentials(bucket, folder)


if __name__ == "__main__":
    main()
