"""Hold what the verbs return, as plain data that `--json` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..settings import __version__

SCHEMA = 1
"""Version of the JSON fields."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The report of one verb; each verb adds its fields."""

    command: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as `--json` prints it."""
        return {"schema": SCHEMA, "version": __version__, **asdict(self)}
