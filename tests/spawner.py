"""Commands in processes of their own that need not import torch first: forked from one that has, and has done nothing else.

For tests that need a process for its environment, its exit code or its death. Run as a script this is that process: it
reads requests as lines of JSON, and answers each with a line, a process id or an exit code.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

ROOT = Path(__file__).parents[1]
FORKS = sys.platform == "linux"


class Process:
    """A command that runs: words after `python -m dora_convert`, or code and its arguments after "-c"."""

    def __init__(self, words: list[str], environment: Mapping[str, str], *, patient: bool = False) -> None:
        self._files = [TemporaryFile(), TemporaryFile()]  # noqa: SIM115 - read once the process is over
        self._words, self._alone = words, None
        if not FORKS:
            self._alone = _alone(words, environment, *self._files)
            self.pid = self._alone.pid
            return
        places = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in self._files]
        self.pid = _ask({"words": words, "environment": dict(environment), "to": places, "patient": patient})

    def send_signal(self, number: signal.Signals) -> None:
        """Ctrl-C, or as the kernel kills when memory runs out."""
        os.kill(self.pid, number)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Its exit code and what it has said, once it is over."""
        code = self._alone.wait() if self._alone else _ask({"wait": self.pid})
        for file in self._files:
            file.seek(0)
        out, err = (file.read().decode() for file in self._files)
        for file in self._files:
            file.close()
        return subprocess.CompletedProcess(self._words, code, out, err)


def _alone(words: list[str], environment: Mapping[str, str], out: IO[bytes], err: IO[bytes]) -> subprocess.Popen[bytes]:
    """A process that begins from nothing, where none can be forked."""
    started = words if words[0] == "-c" else ["-m", "dora_convert", *words]
    known = dict(environment) | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *started], env=known, stdout=out, stderr=err)


def _ask(request: dict) -> int:
    server, lock = _spawner()
    with lock:
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())


@cache
def _spawner() -> tuple[subprocess.Popen[str], threading.Lock]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(server.communicate)  # it ends with its input
    return server, threading.Lock()


def _serve() -> None:
    """Answer requests until there are none; whoever asks is gone then."""
    import dora_convert
    from dora_convert.scripted import Scripted

    for module in pkgutil.walk_packages(dora_convert.__path__, "dora_convert."):
        if "__main__" not in module.name and ".integrations" not in module.name:  # these need other packages
            importlib.import_module(module.name)
    assert "huggingface_hub" not in sys.modules, "it reads the environment, which is the child's"
    for function in [value for value in gc.get_objects() if type(value) is Scripted]:
        function._compile()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif not (answer := os.fork()):
            _become(**request)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _become(words: list[str], environment: dict[str, str], to: list[str], patient: bool) -> None:  # noqa: FBT001
    """The child: what `python -m dora_convert` would be, in an environment of its own."""
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in enumerate(to, 1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests behind ignores it
    if not patient:
        _hurry()
    code = 1
    try:
        _run(words)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 - as Python does at the end
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _hurry() -> None:
    """Nobody waits for the disk, nor for a Hub that is in trouble on purpose: what is tried again is tried at once."""
    import time

    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))
    os.fsync = looked_at


def looked_at(descriptor: int) -> None:
    """Do as os.fsync does, errors included, but write nothing."""
    os.fstat(descriptor)


def _run(words: list[str]) -> None:
    from dora_convert.cli import main

    if words[0] == "-c":
        sys.argv = words[:1] + words[2:]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = ["dora-convert", *words]
        main()


if __name__ == "__main__":
    _serve()
