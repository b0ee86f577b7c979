"""Find the k-th largest number of a stream of blocks, exactly, without sorting or holding all of them.

A sample gives an interval that holds the wanted number most likely. A pass over all blocks counts the numbers above
the interval, and collects those inside. If the guess was wrong, or too many numbers lie inside, further passes count
the numbers by 16 of their bits at a time, which narrows the interval to one that is right for certain.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

CAPACITY = 1 << 19
"""Numbers of one stream that are collected at most."""
DIGITS = 16
SIGMAS = 4.0
"""Width of the guessed interval, in standard errors of the sample's quantile."""
INTEGERS = {4: torch.int32, 8: torch.int64}


class KthLargest:
    """The k-th largest of n numbers ≥ 0 that pass by in blocks, as often as `done` is False."""

    def __init__(self, k: int, n: int, capacity: int = CAPACITY) -> None:
        """Ask for the k-th largest of n."""
        self.k, self.n, self._capacity = k, n, capacity
        self.value = sys.float_info.max
        """The k-th largest number; the largest of all numbers if k is 0."""
        self.equal = self.wanted = 0
        """The number of equals of it, and of those among the k largest."""
        self.done = k == 0
        self._low, self._high = 0.0, float("inf")
        self._above = self._inside = 0
        self._found: list[Tensor] = []
        self._counts: Tensor | None = None

    @property
    def samples(self) -> bool:
        """True if a sample saves passes: the numbers are too many to be collected."""
        return not self.done and self.n > self._capacity

    def guess(self, strips: list[Tensor]) -> None:
        """Choose the interval by a sample: strips of numbers from all parts of the stream."""
        sample = torch.cat([strip.flatten() for strip in strips])
        share = self.k / self.n
        middle = self._quantile(sample, share)
        shares = torch.stack([(strip > middle).double().mean() for strip in strips])
        error = float(shares.std()) / len(strips) ** 0.5 if len(strips) > 1 else 0.05
        margin = min(SIGMAS * error + 4.0 / len(sample) ** 0.5, 0.45 * self._capacity / self.n)
        self._low = self._quantile(sample, share + margin)
        self._high = self._quantile(sample, share - margin) if share > margin else float("inf")

    @staticmethod
    def _quantile(sample: Tensor, share: float) -> float:
        """Return the number that a share of the sample exceeds; 0 if all do."""
        rank = max(1, round(share * len(sample)))
        return 0.0 if rank > len(sample) else float(sample.kthvalue(len(sample) + 1 - rank).values)

    def add(self, numbers: Tensor) -> None:
        """Take a block."""
        if self._counts is not None:
            self._count(numbers)
            return
        self._above += int(torch.count_nonzero(numbers > self._high))
        inside = numbers.clamp(self._low, self._high) == numbers
        self._inside += int(torch.count_nonzero(inside))
        if self._inside <= self._capacity:
            self._found.append(numbers[inside])
        else:
            self._found.clear()

    def finish(self) -> bool:
        """End a pass; return True if the number is found, else choose a narrower interval for the next pass."""
        if self.done:
            return True
        if self._counts is not None:
            self._narrow()
        elif not self._above < self.k <= self._above + self._inside or self._inside > self._capacity:
            self._restart()
        else:
            self._settle()
        return self.done

    def _settle(self) -> None:
        """Find the number among the collected ones."""
        found, rank = torch.cat(self._found), self.k - self._above
        value = found.kthvalue(len(found) + 1 - rank).values
        self._end(float(value), int((found == value).sum()), rank - int((found > value).sum()))

    def _end(self, value: float, equal: int, wanted: int) -> None:
        self.value, self.equal, self.wanted, self.done = value, equal, wanted, True
        self._found, self._counts = [], None

    # ---- the passes that are right for certain: bits of numbers ≥ 0 grow with the numbers

    def _restart(self) -> None:
        """Begin to count all numbers by their highest bits."""
        self._found, self._prefix, self._above = [], 0, 0
        self._shift = -1
        self._counts = torch.zeros(1 << DIGITS, dtype=torch.int64)

    def _count(self, numbers: Tensor) -> None:
        assert self._counts is not None
        size = numbers.element_size()
        if self._shift < 0:
            self._shift, self._bits = 8 * size - DIGITS, 8 * size
        self._like = numbers.dtype
        bits = numbers.reshape(-1).view(INTEGERS[size])
        if (known := self._shift + DIGITS) < 8 * size:
            bits = bits[(bits >> known) == self._prefix]
        digits = (bits >> self._shift) & ((1 << DIGITS) - 1)
        self._counts += torch.bincount(digits.long(), minlength=1 << DIGITS).cpu()

    def _narrow(self) -> None:
        """Choose the digit that the number has; collect the numbers with these bits if they are few enough."""
        assert self._counts is not None
        above = self._counts.flip(0).cumsum(0)
        place = int((above >= self.k - self._above).nonzero()[0])
        digit, inside = len(above) - 1 - place, int(self._counts[len(above) - 1 - place])
        self._above += int(above[place]) - inside
        self._prefix = (self._prefix << DIGITS) | digit
        if self._shift == 0:
            self._end(self._number(self._prefix), inside, self.k - self._above)
        elif inside <= self._capacity:
            self._low = self._number(self._prefix << self._shift)
            self._high = self._number((self._prefix + 1 << self._shift) - 1)
            self._counts, self._above, self._inside = None, 0, 0
        else:
            self._counts.zero_()
            self._shift -= DIGITS

    def _number(self, bits: int) -> float:
        """Return the number with these bits."""
        return float(torch.tensor(bits, dtype=INTEGERS[self._bits // 8]).view(self._like))
