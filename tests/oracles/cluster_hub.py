"""Merge from Hub to Hub on a Ray cluster whose nodes share no folder; lose a node, the driver.

    python -m tests.oracles.cluster_hub [--cases plain lost_node killed_driver]

Needs the extra `[ray]`, Linux and root: nodes run in mount namespaces in which the driver's folders are empty. A server
on loopback plays the Hub. `make cluster` runs it. Every case must end with the bytes of a local merge, and one commit.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from ray.cluster_utils import Cluster

from ..hubserver import Hub, settings
from . import cluster as on_cluster
from .cluster_stores import nodes
from .stores import run, say, synthetic

REPO = "me/merged"
WORDS = ["merge", "org/base", "me/dora", "--push-to-hub", REPO, "--no-local", "--cluster", "auto"]


def plain(hub: Hub, cluster: Cluster, _: list) -> str:
    """Merge, and count what was sent."""
    _, errors = run([*WORDS, "--json"], RAY_ADDRESS=cluster.address)
    return next(line for line in errors.splitlines() if line.startswith("cluster:"))


def lost_node(hub: Hub, cluster: Cluster, processes: list) -> str:
    """A node is gone after the first shard has come."""
    process = on_cluster.start(WORDS, cluster.address)
    done = wait_for(hub, process)
    os.killpg(processes[0].pid, signal.SIGKILL)
    on_cluster.finish(process)
    return f"lost after {done} shards, went on"


def killed_driver(hub: Hub, cluster: Cluster, _: list) -> str:
    """The same command takes what the killed one has entered in its journal."""
    process = on_cluster.start(WORDS, cluster.address)
    wait_for(hub, process, 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = len(hub.uploads)
    _, errors = run(WORDS, RAY_ADDRESS=cluster.address)
    resumed = next((line for line in errors.splitlines() if "resumed" in line), "nothing was entered yet")
    return f"{before} shards there, {resumed}"


def wait_for(hub: Hub, process: subprocess.Popen[str], count: int = 1) -> int:
    """Wait until so many shards have come; return the number."""
    while len(hub.uploads) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return len(hub.uploads)


def check(hub: Hub, local: Path) -> None:
    """The repo has one commit, with the weights of a local merge."""
    folder = hub.repos[REPO]
    weights = {path.relative_to(local): path.read_bytes() for path in local.rglob("*.safetensors")}
    assert {path.relative_to(folder) for path in folder.rglob("*.safetensors")} == weights.keys()
    for name, data in weights.items():
        assert (folder / name).read_bytes() == data, name
    assert len(hub.state[REPO].commits) == 2
    assert len(hub.uploads) - len(set(hub.uploads)) <= 1, "a lost node's shard may be sent twice"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = {case.__name__: case for case in (plain, lost_node, killed_driver)}
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    chosen = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="dora-convert-hub-") as name:
        folder = Path(name)
        shapes = synthetic.shapes(2, 1000, 0)
        linear = {name: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
        synthetic.write_base(folder / "base", shapes, 6)
        synthetic.write_adapter(folder / "dora", linear, 8, dora=True)
        run(["merge", folder / "base", folder / "dora", folder / "local"])
        for case in chosen.cases:
            (folder / case).mkdir()
            hub = Hub({"org/base": folder / "base", "me/dora": folder / "dora"}, folder / case)
            (folder / case / "driver").mkdir()
            os.environ |= settings(hub, folder / case / "driver")
            begun = time.monotonic()
            with nodes(folder / case / "driver") as (cluster, processes):
                words = cases[case](hub, cluster, processes)
            check(hub, folder / "local")
            say(f"{case}: {words} ({time.monotonic() - begun:.1f} s)")
            hub.shutdown()


if __name__ == "__main__":
    main()
