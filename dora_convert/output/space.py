"""Take space for a file ahead of its bytes, and give it back while the file keeps its size."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

HOLE = 0x01 | 0x02
"""Linux's FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE."""
_NOT_HERE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def allocate(descriptor: int, size: int) -> None:
    """Allocate a file's space now: faster than growing it, and a full disk shows at once.

    Some file systems cannot do it. There the C library's `posix_fallocate` writes a byte into every block, which
    takes as long as writing the file. Linux's own call refuses instead.
    """
    try:
        if sys.platform == "linux" and size:
            _fallocate(descriptor, 0, 0, size)
        elif hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise


def free(descriptor: int, start: int, stop: int) -> bool:
    """Free the space of a range of bytes, which are zeros then, in one step; return False where it is not possible."""
    if sys.platform != "linux" or stop <= start:
        return False
    try:
        return _fallocate(descriptor, HOLE, start, stop - start)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return False


def _fallocate(descriptor: int, mode: int, start: int, length: int) -> bool:
    """Call Linux's fallocate; return False for a C library without it.

    Raises OSError, with EOPNOTSUPP on file systems that cannot do it.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call is None:
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while call(descriptor, mode, start, length):
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True
