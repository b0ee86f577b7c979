"""Simulate merges of large models on clusters: tasks go to hosts as they have time. `scale.py` is the command."""

from __future__ import annotations

import argparse
import heapq
import math
from dataclasses import dataclass

PIECE = 64 << 20
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Storage:
    """GB/s of one host and of all hosts together, reading and writing, and seconds until the first byte."""

    host_read: float
    host_write: float
    all_read: float
    all_write: float
    wait: float


STORAGES = {
    "NFS": Storage(1.1, 1.1, 5.0, 3.0, 0.002),
    "NVMe": Storage(5.0, 2.5, math.inf, math.inf, 0.0002),
    "object store": Storage(2.5, 2.5, math.inf, math.inf, 0.05),
}
"""One NFS server on 10 GbE clients; a parallel file system over the hosts' own NVMe; S3 through 25 GbE."""


ASSUMED: dict[str, tuple[float, str]] = {
    "cores": (16, "tasks that a host does at once"),
    "compute": (0.4, "GB/s that one core merges, checks and hashes, without waiting for the disk"),
    "task": (32, "least MiB of one task"),
    "rounds": (2.0, "a task takes at most this part of the work left for each slot"),
    "driver": (1.0, "milliseconds of the driver for each task"),
    "plan": (7, "seconds to plan"),
    "start": (8, "seconds until the nodes' processes have torch, which they import while the plan is made"),
    "begin": (1, "seconds until they have the plan, too"),
    "publish": (2, "seconds to write the receipt and to rename"),
    "shard": (0.0, "GB of a shard, for tasks of whole shards: OUT is in an object store; 0 for tasks of tensors"),
    "connection": (0.3, "GB/s that one process uploads"),
    "overlap": (0.0, "share of a task in which reading, computing and writing do not overlap"),
}
"""The assumptions of a simulation: default and meaning."""


def tasks_of(tensors: Shapes, slots: int, chosen: argparse.Namespace) -> list[float]:
    """Return the bytes of each task: tensors in the order of files, grouped as dora_convert/cluster does.

    Tensors that no adapter touches are copied in pieces of 64 MiB.
    """
    sizes: list[float] = []
    for name, shape in tensors.items():
        nbytes, most = 2.0 * math.prod(shape), PIECE if "embed" in name or "head" in name else math.inf
        sizes += [min(most, nbytes - done) for done in range(0, int(nbytes), int(min(most, nbytes)))]
    groups, size, left = [], 0.0, sum(sizes)
    for nbytes in sizes:
        if size and size + nbytes > max(chosen.task * 2**20, left / (chosen.rounds * slots)):
            groups.append(size)
            size, left = 0.0, left - size
        size += nbytes
    return [*groups, size]


def shards_of(tensors: Shapes, chosen: argparse.Namespace) -> list[float]:
    """Return the bytes of each task if OUT is in an object store: whole shards, which their makers upload."""
    left, size, shards = 2.0 * sum(map(math.prod, tensors.values())), chosen.shard * 1e9, []
    while left > 0:
        shards.append(min(size, left))
        left -= size
    return shards


def shard_seconds(storage: Storage, running: int, chosen: argparse.Namespace) -> tuple[float, str]:
    """Return the seconds of a process for each GB of a shard, and what bounds them; `running` processes share a host.

    A process makes a shard, and then uploads it through one connection. Meanwhile others of the host compute.
    """
    bounds = {
        "make, then upload": 1 / chosen.compute + 1 / chosen.connection,
        "write": running / storage.host_write,
        "read": running / storage.host_read,
    }
    bound = max(bounds, key=bounds.__getitem__)
    return bounds[bound], bound


def simulate_shards(tensors: Shapes, storage: Storage, hosts: int, chosen: argparse.Namespace) -> dict[str, float]:
    """Return what `simulate` returns, for tasks of whole shards."""
    shards, slots = shards_of(tensors, chosen), hosts * chosen.cores
    running = min(chosen.cores, math.ceil(len(shards) / hosts))
    each, bound = shard_seconds(storage, running, chosen)
    free = [0.0] * min(slots, len(shards))
    for nbytes in shards:
        heapq.heappush(free, heapq.heappop(free) + nbytes / 1e9 * each + 2 * storage.wait)
    serial = max(chosen.plan, chosen.start) + chosen.begin + chosen.publish
    return {"serial": serial, "writing": max(free), "bound": bound}  # type: ignore[dict-item]


def simulate(tensors: Shapes, storage: Storage, hosts: int, chosen: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of planning and starting, of writing, and the rate that bounds the writing."""
    if chosen.shard:
        return simulate_shards(tensors, storage, hosts, chosen)
    workers = hosts * chosen.cores
    rates = {
        "read": min(storage.host_read / chosen.cores, storage.all_read / workers),
        "write": min(storage.host_write / chosen.cores, storage.all_write / workers),
        "compute": chosen.compute,
    }
    slowest = min(rates, key=rates.__getitem__)
    free = [0.0] * workers
    driver = end = 0.0
    for nbytes in tasks_of(tensors, workers, chosen):
        driver += chosen.driver / 1000  # the driver submits, takes and enters each task
        seconds = nbytes / 1e9 / rates[slowest] * (1 - chosen.overlap)
        seconds += nbytes / 1e9 * sum(1 / rate for rate in rates.values()) * chosen.overlap if chosen.overlap else 0
        stop = max(heapq.heappop(free), driver) + seconds + storage.wait
        heapq.heappush(free, stop)
        end = max(end, stop)
    serial = max(chosen.plan, chosen.start) + chosen.begin + chosen.publish
    bound = "driver" if driver > 0.95 * end else slowest
    return {"serial": serial, "writing": end, "bound": bound}  # type: ignore[dict-item]


def table(tensors: Shapes, chosen: argparse.Namespace) -> None:
    """Print times and speed-ups for 1, 8 and 64 hosts."""
    for name in ASSUMED:
        print(f"--{name} {getattr(chosen, name):g}", end="  ")
    print()
    total = 2 * sum(map(math.prod, tensors.values()))
    for name, storage in STORAGES.items():
        if chosen.shard and name != "object store":
            continue
        print(f"{name}: {storage}")
        one = simulate(tensors, storage, 1, chosen)
        for hosts in (1, 8, 64):
            found = simulate(tensors, storage, hosts, chosen)
            writing = one["writing"] / found["writing"]
            whole = (one["writing"] + one["serial"]) / (found["writing"] + found["serial"])
            hours = (found["writing"] + found["serial"]) / 3600
            print(f"  {hosts:2} hosts: {hours:6.3f} h, {total / hosts / 1e9:6.1f} GB a host each way", end="")
            print(f", bound by {found['bound']}; writing {writing:.1f} ×, whole {whole:.1f} ×")
