"""Turn numbers into positions and colours of charts; templates and pictures draw them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MOST_TICKS = 5
VIRIDIS = (
    "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725",
)  # fmt: skip
"""The colour map viridis without its darkest end: equally bright steps, also for the colour-blind."""
LINES = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#8c8c8c")
"""Paul Tol's bright scheme: lines that the colour-blind tell apart."""
DASHES = ("", "6 3", "2 3", "8 3 2 3")
"""Patterns of lines beyond the seventh."""


def colour(share: float) -> str:
    """Return the colour of a share between 0 and 1, between the two colours around it."""
    place = min(1.0, max(0.0, share)) * (len(VIRIDIS) - 1)
    below = min(math.floor(place), len(VIRIDIS) - 2)
    low, high = (_rgb(VIRIDIS[below + step]) for step in (0, 1))
    mixed = [round(a + (place - below) * (b - a)) for a, b in zip(low, high, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _rgb(code: str) -> tuple[int, int, int]:
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)


def power_of_ten(exponent: int) -> str:
    """Return 10 to a power, for people."""
    return f"10{str(exponent).translate(SUPERSCRIPTS)}"


@dataclass(frozen=True)
class LinearAxis:
    """An axis from `low` to `high`, drawn from `start` to `end`; its labels are in units of 10**exponent."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float, *, zero: bool = False) -> LinearAxis:
        """Return the axis that holds all values, with a little room; `zero` begins it at zero."""
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = (0.0 if zero else min(finite)), max(finite)
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        return cls(low if zero else low - room, high + room, start, end)

    def at(self, value: float) -> float:
        """Return the position of a value."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    @property
    def exponent(self) -> int:
        """The power of ten that labels leave out; 0 for numbers that read well."""
        largest = max(abs(self.low), abs(self.high))
        power = math.floor(math.log10(largest)) if largest > 0 else 0
        return 0 if -1 <= power <= 3 else power

    @property
    def unit(self) -> str:
        """The power of ten to put behind an axis's name."""
        return f" × {power_of_ten(self.exponent)}" if self.exponent else ""

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Positions and labels of a few round numbers."""
        span = (self.high - self.low) / MOST_TICKS
        power = 10.0 ** math.floor(math.log10(span))
        step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= span * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        numbers = [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decimals = max(0, -math.floor(math.log10(step / 10.0**self.exponent) + 1e-9))
        return [(self.at(each), f"{each / 10.0**self.exponent:.{decimals}f}".replace("-", "−")) for each in numbers]


def log_share(value: float, low: float, high: float) -> float:
    """Return the place of a value between two others on a logarithmic scale, between 0 and 1."""
    if high <= low:
        return 1.0
    return math.log(value / low) / math.log(high / low)


def marker(index: int, size: float = 4.0) -> str:
    """Return the path of a step's marker around the origin; there are six."""
    s, c = size, 0.55 * size
    shapes: Sequence[str] = (
        f"M{-s} 0C{-s} {-c} {-c} {-s} 0 {-s}S{s} {-c} {s} 0 {c} {s} 0 {s} {-s} {c} {-s} 0Z",
        f"M{-s} {-s}H{s}V{s}H{-s}Z",
        f"M0 {-1.25 * s}L{1.15 * s} {s}H{-1.15 * s}Z",
        f"M0 {-1.35 * s}L{1.35 * s} 0 0 {1.35 * s} {-1.35 * s} 0Z",
        f"M0 {1.25 * s}L{1.15 * s} {-s}H{-1.15 * s}Z",
        f"M{-s} {-s / 3}H{-s / 3}V{-s}H{s / 3}V{-s / 3}H{s}V{s / 3}H{s / 3}V{s}H{-s / 3}V{s / 3}H{-s}Z",
    )
    return shapes[index % len(shapes)]
