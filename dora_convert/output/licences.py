"""Choose the licence of a model that is made of several works, by their model cards. This is not legal advice."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any, NamedTuple

PERMISSIVE = (
    "cc0-1.0", "unlicense", "wtfpl", "isc", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "apache-2.0",
)  # fmt: skip
"""Licences that ask for little, those with more terms last."""
COPYLEFT = ("mpl", "lgpl", "gpl", "agpl")
"""Beginnings of the names of licences that derived works keep, the stricter ones last."""


class Licence(NamedTuple):
    """The fields of a model card that name a licence."""

    license: str
    license_name: str | None = None
    license_link: str | None = None

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Licence | None:
        """Return the licence of a card's front matter; None if the card names none, or several."""
        if not isinstance(name := metadata.get("license"), str) or not name:
            return None
        more = (metadata.get(field) for field in cls._fields[1:])
        return cls(name, *(value if isinstance(value, str) else None for value in more))

    def __str__(self) -> str:
        return self.license_name or self.license


UNCLEAR = Licence("other", "several", None)
"""The licence where none of the works' licences holds the terms of all others."""


def strictest(licences: Mapping[str, Licence]) -> Licence | None:
    """Return the licence that is stricter than all others, by the works' roles; UNCLEAR if none is."""
    candidates = set(licences.values())
    for pair in combinations(candidates, 2):
        stricter = _stricter(*pair)
        candidates -= {licence for licence in pair if licence != stricter}
        if stricter is None:
            return UNCLEAR
    return next(iter(candidates), None)


def _stricter(one: Licence, other: Licence) -> Licence | None:
    """Return the stricter of two licences; None if each has terms that the other one lacks."""
    low, high = sorted((one, other), key=_strictness)
    kinds = _strictness(low)[0], _strictness(high)[0]
    comparable = _strictness(low) != _strictness(high) and (kinds[0] == 0 or kinds[0] == kinds[1])
    return high if comparable else None


def _strictness(licence: Licence) -> tuple[int, int]:
    """Return a number for the kind of a licence, and its place among those of the kind."""
    name = licence.license.lower()
    if name in PERMISSIVE:
        return 0, PERMISSIVE.index(name)
    if name.startswith(COPYLEFT):
        return 1, next(place for place, start in enumerate(COPYLEFT) if name.startswith(start))
    if name.startswith("cc-by-nc"):
        return 3, len(name.split("-"))
    return 2, 0


def explained(licences: Mapping[str, Licence], chosen: Licence | None) -> str | None:
    """Return a sentence about the choice; None if the works do not differ."""
    if len(set(licences.values())) < 2:
        return None
    works = " and ".join(f"{licence} ({role})" for role, licence in licences.items())
    if chosen == UNCLEAR:
        return f"licence: the terms of {works} hold together; none includes the others"
    return f"licence: {chosen}, the stricter of {works}"
