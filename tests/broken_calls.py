"""A command whose n-th call to the file system kills it, or fails: code for `spawner.Process`, driven by test_robust_kills.py.

Arguments: what happens (kill, or the name of an errno, with "+" for "from then on"), at which call, a file that the number
of calls is written to, and the command's words. Counted are the calls that change a disk, and for EMFILE all that open
something. What is killed in the middle of a write has written half of it.
"""

# ruff: noqa: FBT002 - open has such arguments
from __future__ import annotations

import builtins
import errno
import io
import os
import pathlib
import sys
import threading

what, at, told = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
number = getattr(errno, what.rstrip("+"), 0)
opening = number in (errno.EMFILE, errno.ENFILE)
seen, lock, real_open = [0], threading.Lock(), io.open


def step(half=lambda: None, path=None):
    """One call more."""
    with lock:
        seen[0] += 1
        due = seen[0] == at or (what.endswith("+") and seen[0] > at)
    if not due:
        return
    if number:
        raise OSError(number, os.strerror(number), path)
    half()
    os._exit(9)


def counted(name, torn=False):
    real = getattr(os, name)

    def inner(*args, **named):
        path = args[0] if args and isinstance(args[0], (str, os.PathLike)) else None
        step(lambda: real(args[0], args[1][: len(args[1]) // 2], *args[2:]) if torn else None, path)
        return real(*args, **named)

    return inner


class Raw(io.FileIO):
    """A file whose writes are counted, too."""

    def write(self, data):
        step(lambda: io.FileIO.write(self, memoryview(data).cast("B")[: len(data) // 2]))
        return super().write(data)


def counted_open(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
    writes = bool(set(mode) & set("wax+"))
    if isinstance(file, int) or not (writes or opening):
        return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
    step(path=file)
    if not writes:
        return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
    raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
    if buffering == 0:
        return raw
    whole = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    return whole if "b" in mode else io.TextIOWrapper(whole, encoding, errors, newline)


def counted_os_open(path, flags, *args, **named):
    if opening or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        step(path=path)
    return real_os_open(path, flags, *args, **named)


real_os_open = os.open
names = {"rename", "replace", "unlink", "remove", "rmdir", "mkdir", "link", "symlink", "truncate", "utime"}
for name in names | {"fsync", "fdatasync", "ftruncate", "posix_fallocate", "copy_file_range", "sendfile"}:
    if hasattr(os, name):
        setattr(os, name, counted(name))
for name in ("pwrite",) if hasattr(os, "pwrite") else ("write",):
    setattr(os, name, counted(name, torn=True))
if hasattr(os, "pwritev"):
    os.pwritev = counted("pwritev", torn=True)  # torn: without the second of its two pieces
for name in ("scandir", "listdir") if opening else ():
    setattr(os, name, counted(name))
os.open, io.open, builtins.open = counted_os_open, counted_open, counted_open
if accessor := getattr(pathlib, "_NormalAccessor", None):  # Python 3.10 has taken these from os already
    for name in names - {"remove"}:
        setattr(accessor, name, staticmethod(getattr(os, name)))
    accessor.open = staticmethod(counted_open)

from dora_convert.cli import main  # noqa: E402
from dora_convert.output import shards, space  # noqa: E402

shards.LEAST_UNCACHED, shards.PAGE = 4096, 1024
real_fallocate = space._fallocate
space._fallocate = lambda *words: (step(), real_fallocate(*words))[1]

try:
    main()
finally:
    fd = real_os_open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.write(fd, str(seen[0]).encode())
    os.close(fd)
