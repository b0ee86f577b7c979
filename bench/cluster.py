"""Time a merge on a Ray cluster on this machine against two workers of this machine; whole processes, in turn.

    python bench/cluster.py [--size 1.24] [--rounds 5] [--nodes 3] [--only dora lora] [--folder bench/build]

The cluster of one processor a node runs before the first round. Needs the extra `[ray]`. *Processors* are the seconds
that all processors of the machine were busy, Ray's own processes included.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from merge import build, warm
from ray.cluster_utils import Cluster

STORE = 80 << 20
Round = tuple[float, float]
"""Seconds of a process, and of all processors meanwhile."""


def busy() -> float:
    """Return the seconds that all processors have been busy; zero where Linux's counters are missing."""
    try:
        line = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return 0.0
    counts = list(map(int, line.split()[1:]))
    return (sum(counts[:8]) - counts[3] - counts[4]) / os.sysconf("SC_CLK_TCK")


def run(words: list[str], out: Path) -> Round:
    """Run one merge as a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    started, before = time.perf_counter(), busy()
    subprocess.run([sys.executable, "-m", "dora_convert", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started, busy() - before


def measure(folder: Path, kind: str, rounds: int) -> dict[str, list[Round]]:
    """Merge in turn with two workers and on the cluster."""
    out = folder / "out"
    words = ["merge", str(folder / "base"), str(folder / kind), str(out), "--quiet"]
    ways = {"two workers": ["--workers", "2"], "cluster": ["--cluster", "auto"]}
    results: dict[str, list[Round]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, options in ways.items():
            warm(folder)
            results[way].append(run([*words, *options], out))
    shutil.rmtree(out)
    return results


def report(kind: str, results: dict[str, list[Round]]) -> None:
    for way, each in results.items():
        seconds, spent = (statistics.median(column) for column in zip(*each, strict=True))
        print(f"{kind:6}{way:13}{seconds:8.2f} s{spent:8.2f} s of processors")
    pairs = zip(results["cluster"], results["two workers"], strict=True)
    ratios = sorted(one[0] / other[0] for one, other in pairs)
    print(f"{kind:6}{'ratio':13}{statistics.median(ratios):8.2f}   from {ratios[0]:.2f} to {ratios[-1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.24, help="billions of parameters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["dora", "lora"])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "build")
    chosen = parser.parse_args()
    folder = build(chosen.folder / f"{chosen.size:g}b", ["--size", str(chosen.size)])
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(chosen.nodes - 1):
            cluster.add_node(num_cpus=1, object_store_memory=STORE)
        os.environ["RAY_ADDRESS"] = cluster.address
        for kind in chosen.only:
            report(kind, measure(folder, kind, chosen.rounds))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
