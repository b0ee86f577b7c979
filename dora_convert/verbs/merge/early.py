"""Begin the output of a merge while torch is imported."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ...output.early import HeadStart
from ...output.folder import OutputFolder
from ...plan.plan import Plan


@contextmanager
def begun_early(folder: OutputFolder, plan: Plan) -> Iterator[None]:
    """Begin to fill a new OUT.partial while the block gets the run ready; remove it if that fails.

    An unfinished run waits until its key is known, and so does a base that is downloaded. A disk without the space is
    left to the run, which says so.
    """
    free = shutil.disk_usage(next(parent for parent in folder.out.parents if parent.exists())).free
    if not plan.base.is_here or os.path.lexists(folder.partial) or free < plan.bytes_out + 2 * plan.undo_bytes:
        yield
        return
    folder.open()
    try:
        with suppress(OSError):  # which the run meets again, and tells
            folder.clear()
            folder.early = HeadStart(folder.partial, plan)
        if not folder.early:
            folder.discard()
        yield
    except BaseException:
        if folder.is_open:  # no run has entered the folder
            with suppress(OSError):
                folder.discard()
        raise
