"""What the receipt of a merge says about how it was made, for whoever checks that merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MalformedError
from ..storage.checkpoint import RECEIPT, RECORD
from ..storage.digests import xxh3
from ..storage.json_files import read_json


@dataclass(frozen=True)
class Recorded:
    """The choices that decided what a merge made."""

    weight: tuple[float, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    ignore_field: tuple[str, ...]
    allow_unmatched: bool

    def __str__(self) -> str:
        """The choices that are not what would be assumed anyway, as on the command line; empty where there are none."""
        weights = self.weight if any(weight != 1 for weight in self.weight) else ()
        given = {
            "weight": weights,
            "include": self.include,
            "exclude": self.exclude,
            "ignore-field": self.ignore_field,
        }
        words = [
            f"--{name} {value:g}" if name == "weight" else f"--{name} {value}"
            for name in given
            for value in given[name]
        ]
        return " ".join([*words, *(["--allow-unmatched"] if self.allow_unmatched else [])])


def read_recorded(merged: Path, adapters: Sequence[Path]) -> Recorded | None:
    """The choices that a merged folder's receipt holds, if these very adapters were merged; None where it is silent.

    Raises MalformedError where the receipt is no JSON.
    """
    if not (path := merged / RECORD / RECEIPT).is_file():
        return None
    receipt = read_json(path)
    noted, options = receipt.get("adapters"), receipt.get("options")
    if receipt.get("verb") != "merge" or not isinstance(noted, list) or not isinstance(options, Mapping):
        return None
    if len(noted) != len(adapters) or not all(map(_is_same, noted, adapters)):
        return None
    try:
        return Recorded(
            tuple(float(adapter["weight"]) for adapter in noted),
            tuple(map(str, options["include"])),
            tuple(map(str, options["exclude"])),
            tuple(map(str, options["ignore_field"])),
            any(entry["fate"] == "unmatched" for entry in receipt["ledger"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedError(f"{path} is not what a merge leaves.", hint="give --weight yourself") from error


def _is_same(noted: Any, adapter: Path) -> bool:
    """Whether an adapter's files are those that a receipt has the hashes of."""
    files = noted.get("files") if isinstance(noted, Mapping) else None
    if not isinstance(files, Mapping) or not files:
        return False
    return all(
        "/" not in name and (adapter / name).is_file() and xxh3(adapter / name) == digest
        for name, digest in files.items()
    )
