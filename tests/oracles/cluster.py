"""Merge on a Ray cluster of three nodes that lose a node, the driver, a disk or a path; compare with a local merge.

    python tests/oracles/cluster.py [--layers 4] [--folder FOLDER]

Needs the extra `[ray]`, and for a node without the path Linux and root (a mount namespace). `make cluster` runs it.
Every case must end with the bytes of the local merge, or with exit code 2 and the words that the user needs.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
STORE, PORT = 80 << 20, 25101
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
RAY = [sys.executable, "-c", "import sys; from ray.scripts.scripts import main; sys.exit(main())"]


@contextmanager
def nodes(count: int = 3) -> Iterator[tuple[Cluster, list]]:
    """Start a cluster of nodes with a processor each; stop it at the end."""
    head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False, "ray_client_server_port": PORT}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster, [cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(count - 1)]
    finally:
        cluster.shutdown()


def start(words: list[object], address: str | None) -> subprocess.Popen[str]:
    """Start a command of dora-convert that finds the cluster as users' do."""
    environment = {**os.environ, **({"RAY_ADDRESS": address} if address else {})}
    command = [sys.executable, "-m", "dora_convert", *map(str, words)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a command, which must exit with a code; return its stderr."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, errors)
    return errors


def lines(out: Path) -> int:
    """The lines in the journal of an unfinished run, without the key."""
    try:
        return len((out.with_name(out.name + ".partial") / "dora_convert/journal.jsonl").read_bytes().splitlines()) - 1
    except FileNotFoundError:
        return 0


def wait_for(out: Path, count: int, process: subprocess.Popen[str]) -> int:
    """Wait until the journal has so many lines."""
    while (done := lines(out)) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return done


def same(one: Path, other: Path) -> None:
    """Every file has the same bytes."""
    names = sorted(path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other).as_posix() for path in other.rglob("*") if path.is_file())
    _, wrong, odd = filecmp.cmpfiles(one, other, names, shallow=False)
    assert not wrong, wrong
    assert not odd, odd


class Cases:
    """The cases, each in a cluster of its own."""

    cluster: Cluster
    others: list
    """Its nodes beside the head."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.local = folder, folder / "local"
        self.out = folder / "shared" / "out"
        self.words = ["merge", folder / "base", folder / "dora", self.out, "--cluster", "auto"]
        finish(start(["merge", folder / "base", folder / "dora", self.local], None))

    def plain(self) -> str:
        finish(start(self.words, self.cluster.address))
        return "same bytes"

    def back_again(self) -> str:
        """Take the adapter out again, and verify the merge, on the cluster."""
        finish(start(self.words, self.cluster.address))
        base, adapter, back = *self.words[1:3], self.out.with_name("back")
        finish(start(["unmerge", self.out, adapter, back, "--cluster", "auto"], self.cluster.address))
        finish(start(["unmerge", self.local, adapter, self.folder / "back"], None))
        same(back, self.folder / "back")
        shutil.rmtree(self.folder / "back")
        finish(start(["verify", base, adapter, self.out, "--cluster", "auto"], self.cluster.address))
        return "unmerge has the bytes of a local one; verify agrees"

    def lost_node(self) -> str:
        process = start(self.words, self.cluster.address)
        done = wait_for(self.out, 8, process)
        until(lambda: any(map(works, self.others)))
        self.cluster.remove_node(next(filter(works, self.others)), allow_graceful=False)
        finish(process)
        return f"removed after {done} lines, went on"

    def killed_driver(self) -> str:
        process = start(self.words, self.cluster.address)
        wait_for(self.out, 20, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return self._resumed()

    def interrupted(self) -> str:
        process = start(self.words, self.cluster.address)
        wait_for(self.out, 20, process)
        process.send_signal(signal.SIGINT)
        errors = finish(process, 130)
        assert "same command" in errors, errors
        return self._resumed()

    def _resumed(self) -> str:
        kept = lines(self.out)
        errors = finish(start(self.words, self.cluster.address))
        notice = next(line for line in errors.splitlines() if "resumed" in line)
        return f"{kept} lines kept; {notice}"

    def interrupted_local(self) -> str:
        """Ctrl-C in a terminal reaches every process of the group, Ray's own included."""
        words = [*self.words[:-1], "local:2"]
        process = start(words, None)
        wait_for(self.out, 20, process)
        os.killpg(process.pid, signal.SIGINT)
        errors = finish(process, 130)
        assert "Traceback" not in errors, errors
        return self._resumed()

    def full_disk(self) -> str:
        """The node beside the head may write no file longer than 300 MB: as a full disk, it fails in the middle."""
        with odd_node(self.cluster, "ulimit -f 300000"):
            errors = finish(start(self.words, self.cluster.address), 2)
        assert "File too large" in errors, errors
        assert "on node" in errors, errors
        assert lines(self.out), "nothing was kept"
        return self._resumed()

    def no_path(self) -> str:
        """One node has another file system at OUT's folder."""
        with odd_node(self.cluster, f"hostname odd-node; mount -t tmpfs none {shlex.quote(str(self.out.parent))}"):
            errors = finish(start(self.words, self.cluster.address), 2)
        assert "odd-node does not see the folder" in errors, errors
        assert not list(self.out.parent.iterdir()), "something was written"
        finish(start(self.words, self.cluster.address))
        return next(line for line in errors.splitlines() if line.startswith("Error"))

    def no_input(self) -> str:
        """One node has nothing at the adapter's path."""
        with odd_node(self.cluster, f"hostname odd-node; mount -t tmpfs none {shlex.quote(str(self.folder / 'dora'))}"):
            errors = finish(start(self.words, self.cluster.address), 2)
        assert "odd-node does not see" in errors, errors
        finish(start(self.words, self.cluster.address))
        return next(line for line in errors.splitlines() if line.startswith("Error"))

    def client(self) -> str:
        """Through Ray Client, from a machine that is not a node."""
        until(_answers)
        words = [*self.words[:-1], f"ray://127.0.0.1:{PORT}"]
        finish(start(words, None))
        return "same bytes"


NODES = {"full_disk": 1, "no_path": 1, "no_input": 1}
"""Nodes of a case before it adds one; three if not named. Nodes of one machine share its processors, and those
without a process are not asked."""


def works(node: object) -> bool:
    """Return True if a process of dora-convert runs on a node."""
    raylet = node.all_processes["raylet"][0].process.pid  # type: ignore[attr-defined]
    children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    return any(b"ray::NodeProcess" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children)


@contextmanager
def odd_node(cluster: Cluster, preparation: str) -> Iterator[subprocess.Popen[bytes]]:
    """Add a node of two processors in a namespace of its own, after some commands; remove it at the end.

    Yields its process, which may be killed meanwhile.
    """
    begin = shlex.join([*RAY, "start", "--address", cluster.address, "--num-cpus", "2", "--block"])
    begin += f" --object-store-memory {STORE}"
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    known = _alive()
    process = subprocess.Popen(
        ["unshare", "--mount", "--uts", "sh", "-c", f"{preparation} && exec {begin}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until(lambda: _alive() > known)
        ray.shutdown()
        yield process
        ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda: _alive() <= known)
    finally:
        ray.shutdown()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def _answers() -> bool:
    """Return True once the server of Ray Client listens."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", PORT), timeout=1):
        return True
    return False


def until(ready: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for something that takes a while."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "too late"
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--layers", default="4")
    parser.add_argument("--folder", type=Path)
    chosen = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
    names = chosen.cases or [name for name, case in vars(Cases).items() if callable(case) and not name.startswith("_")]
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="dora-convert-cluster-"))
    if not (folder / "base").exists():
        words = [ROOT / "bench/synthetic.py", folder, "--layers", chosen.layers, "--shards", "2"]
        subprocess.run([sys.executable, *map(str, words)], check=True)
    shutil.rmtree(folder / "local", ignore_errors=True)
    cases = Cases(folder)
    for name in names:
        shutil.rmtree(cases.out.parent, ignore_errors=True)
        cases.out.parent.mkdir(parents=True)
        with nodes(NODES.get(name, 3)) as (cases.cluster, cases.others):
            begun = time.monotonic()
            words = getattr(cases, name)()
            same(cases.out, cases.local)
        sys.stdout.write(f"{name}: {words} ({time.monotonic() - begun:.1f} s)\n")
        sys.stdout.flush()
    if not chosen.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
