"""Say which addresses of clusters there are."""

from __future__ import annotations

import re

from ..errors import UsageError

LOCAL = re.compile(r"local(?::([1-9]\d*))?")
"""A cluster that is started on this machine, with so many processors."""
_REMOTE = re.compile(r"ray://[^\s/]+:\d+")


def check_address(address: str) -> None:
    """Raise UsageError for what is no address of a cluster."""
    if address != "auto" and not LOCAL.fullmatch(address) and not _REMOTE.fullmatch(address):
        raise UsageError(f"--cluster {address!r} is not one of auto, local, local:N, ray://HOST:PORT.")
