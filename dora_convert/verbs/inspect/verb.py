"""Offer the verb inspect: describe a checkpoint or an adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ...plan.options import parse_options
from ...reports.inspect import AdapterReport, CheckpointReport
from ...sources.session import open_session
from ...storage.refs import PathLike
from .describe import inspect_ref


def inspect(
    ref: PathLike,
    base: PathLike | None = None,
    *,
    ignore_field: Sequence[str] = (),
    ignore_file: Sequence[str] = (),
    cache: bool = True,
    token: str | None = None,
) -> AdapterReport | CheckpointReport:
    """Describe an adapter or a checkpoint by its headers and small files; no weights are downloaded.

    With `base`, the report of an adapter says where each of its tensors would land in the base, and lists
    everything that does not fit. Without `cache`, downloads are removed at the end.

    Raises DoraConvertError for a REF that cannot be read, or is neither.
    """
    with open_session(token, cache=cache) as session:
        waived = parse_options(ignore_field=ignore_field, ignore_file=ignore_file).waived
        return inspect_ref(os.fspath(ref), None if base is None else os.fspath(base), waived, session)
