"""Merge on a Ray cluster of three nodes with an address each, as machines have; lose one of them.

    python -m tests.oracles.cluster_addresses

Needs the extra `[ray]`, Linux and root: every node but the first runs in a network namespace of its own, behind a
bridge. So each is a machine to Ray, and gets a process of its own. A cluster that others can reach has a token. `make
cluster` runs it. Both runs must end with the bytes of a local merge.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # Ray reads them when imported
import ray

from . import cluster as on_cluster
from .stores import run, say, synthetic

NETWORK, NODES, LAYERS = "10.77.0", 3, 4
HEAD = f"{NETWORK}.1:6379"
MOST_SECONDS = 60


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)


@contextmanager
def network() -> Iterator[list[str]]:
    """Make namespaces on a bridge that this machine is on, too; yield their names."""
    names = [f"dora-convert-{number}" for number in range(2, NODES + 1)]
    with ExitStack() as stack:
        ip("link", "add", "dora0", "type", "bridge")
        stack.callback(ip, "link", "del", "dora0")
        ip("addr", "add", f"{NETWORK}.1/24", "dev", "dora0")
        ip("link", "set", "dora0", "up")
        for number, name in enumerate(names, 2):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("link", "add", f"dora{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"dora{number}", "master", "dora0", "up")
            ip("-n", name, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names


@contextmanager
def node(words: list[str], namespace: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Start a node with one processor; end it with all that it has started."""
    command = [*on_cluster.RAY, "start", *words, "--num-cpus", "1", "--block"]
    command += ["--object-store-memory", str(on_cluster.STORE)]
    if namespace:
        named = ["unshare", "--uts", "sh", "-c", f'hostname {namespace} && exec "$@"', "sh"]
        command = ["ip", "netns", "exec", namespace, *named, *command]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def nodes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start a cluster; yield the processes of all nodes but the first, once all have joined."""
    with network() as names, ExitStack() as stack:
        head = ["--head", "--node-ip-address", f"{NETWORK}.1", "--port", HEAD.partition(":")[2]]
        stack.enter_context(node([*head, "--include-dashboard", "false"]))
        on_cluster.until(_answers)
        with _joined():
            found = [stack.enter_context(_another(number, name)) for number, name in enumerate(names, 2)]
        yield found


@contextmanager
def _joined() -> Iterator[None]:
    """Look at the cluster as one that has joined it."""
    ray.init(HEAD, logging_level="ERROR", log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()  # without a cluster, it would end the process, and nobody would read why


@contextmanager
def _another(number: int, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a node and wait for it: two that start at once in one folder of Ray's choose the same name for a socket."""
    with node(["--address", HEAD, "--node-ip-address", f"{NETWORK}.{number}"], name) as process:
        on_cluster.until(lambda: len(ray.nodes()) == number)
        yield process


def _answers() -> bool:
    done = subprocess.run([*on_cluster.RAY, "status", "--address", HEAD], check=False, capture_output=True)
    return done.returncode == 0


def working() -> set[str]:
    """Return the network namespaces in which processes of dora-convert have used a processor for a second."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"ray::NodeProcess" not in (folder / "cmdline").read_bytes():
                continue
            numbers = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(numbers[11]) + int(numbers[12]) > os.sysconf("SC_CLK_TCK"):
                found.add(str((folder / "ns/net").readlink()))
    return found


def merged(words: list[object], lost: subprocess.Popen[bytes] | None = None) -> tuple[int, str]:
    """Merge, and lose a node meanwhile; return the number of namespaces at work, and the line about the cluster."""
    process, seen = on_cluster.start(words, HEAD), set[str]()
    end = time.monotonic() + MOST_SECONDS
    while process.poll() is None and time.monotonic() < end:
        seen |= working()
        if lost and on_cluster.lines(Path(str(words[3]))) > NODES:
            os.killpg(lost.pid, signal.SIGKILL)
            lost = None
        time.sleep(0.02)
    assert not lost, "it ended before a node was lost"
    errors = on_cluster.finish(process)
    return len(seen), next(line for line in errors.splitlines() if line.startswith("cluster:"))


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="dora-convert-addresses-") as name:
        folder = Path(name)
        shapes = synthetic.shapes(LAYERS, 1000, 0)
        linear = {name: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
        synthetic.write_base(folder / "base", shapes, 6)
        synthetic.write_adapter(folder / "dora", linear, 8, dora=True)
        words = [folder / "base", folder / "dora"]
        run(["merge", *words, folder / "local"])
        out = folder / "out"
        with nodes() as others:
            count, line = merged(["merge", *words, out, "--cluster", "auto"])
            on_cluster.same(out, folder / "local")
            assert count == NODES - 1, f"{count} of {NODES - 1} other machines were at work"
            say(f"three addresses: {line}; processes of {count} other machines at work; same bytes")
            shutil.rmtree(out)
            merged(["merge", *words, out, "--cluster", "auto"], others[0])
            on_cluster.same(out, folder / "local")
            say("a machine lost: the others went on; same bytes")


if __name__ == "__main__":
    main()
