"""What every verb that writes a folder goes through: a device, a budget, OUT.partial, and what an unfinished run left there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .. import __version__
from ..errors import NumericalError, OutputError
from ..output.output import Output
from ..settings import Settings
from ..storage.filenames import JOURNAL, RECORD
from ..storage.journal import JournalKey, UnfinishedRun, read_journal
from .precision import ComputeSpec, choose


def settle(least: int, settings: Settings) -> ComputeSpec:
    """Device and dtype, announced; and a memory budget that holds the costliest piece of work.

    Raises UsageError naming the least budget that will do.
    """
    settings.check_memory(least)
    spec = choose(settings.device, settings.compute_dtype)
    settings.notify(f"device: {spec}")
    return spec


@contextmanager
def entered(folder: Output) -> Iterator[None]:
    """OUT.partial, locked. What is done there stays for the same command to continue, unless it would fail again."""
    folder.open()
    try:
        yield
    except NumericalError:
        folder.discard()
        raise
    except OSError as error:
        kept = (folder.record / JOURNAL).exists()
        folder.leave() if kept else folder.discard()
        raise OutputError(
            f"{folder.out} cannot be written: {error.strerror or error}.",
            hint=f"what is done stays in {folder.partial}; the same command continues it" if kept else None,
        ) from error
    except BaseException:
        folder.leave()
        raise


def journal_key(spec: ComputeSpec, identity: Mapping[str, Any], **inputs: Any) -> JournalKey:
    """Return everything that decides the output's bytes: the inputs' identity, `inputs`, versions and the device."""
    key = {
        **inputs,
        **identity,
        "versions": [__version__, torch.__version__],
        "device": spec.device.type,
        "compute": spec.compute_name,
    }
    found: JournalKey = json.loads(json.dumps(key))  # as it will be read back
    return found


def earlier_run(
    folder: Output, key: JournalKey, keep: list[str], whole: Callable[[], bool], line_type: type
) -> UnfinishedRun | None:
    """The journal of an unfinished run of the same key; OUT.partial is then ready to go on, else empty.

    `keep` names the files that go on, `whole` says whether all of them are there, `line_type` the type of the journal's lines.
    """
    earlier = read_journal(folder.record / JOURNAL)
    if earlier and earlier.key == key and whole():
        earlier = read_journal(folder.record / JOURNAL, line_type)
        folder.clear(keep=[RECORD, *keep])
        return earlier
    if earlier and earlier.key != key and not folder.overwrite:
        raise OutputError(
            f"{folder.partial} holds an unfinished run of something else.",
            hint=folder.WAY_OUT,
        )
    folder.clear()
    return None
