"""inspect: what a checkpoint or an adapter is."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ...reports.inspect import AdapterReport, CheckpointReport
from ...sources.session import open_session
from ...storage.refs import PathLike
from .describe import inspect_ref


def inspect(
    ref: PathLike,
    base: PathLike | None = None,
    *,
    ignore_field: Sequence[str] = (),
    cache: bool = True,
    token: str | None = None,
) -> AdapterReport | CheckpointReport:
    """What is this? Told from headers and small files alone; of a model on the Hub no weights are downloaded.

    `ref` is an adapter or a checkpoint. With `base`, the report of an adapter says where each of its tensors would land
    in it, or everything that does not fit. Without `cache`, what is downloaded of a repo does not stay.

    Raises DoraConvertError for what cannot be read, or is neither.
    """
    with open_session(token, cache=cache) as session:
        return inspect_ref(os.fspath(ref), None if base is None else os.fspath(base), ignore_field, session)
