"""Find the k-th largest number of a stream of blocks, exactly, without sorting or holding all of them.

The first pass holds the numbers of an interval. Whenever these become too many, the interval shrinks around the rank
that the wanted number has among those seen so far. If the wanted number leaves the interval after all, further passes
count the numbers by 16 of their bits at a time, which narrows the interval to one that is right for certain.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

CAPACITY = 1 << 19
"""Numbers of one stream that are held at most, beside those of a block."""
SAMPLED, MARGIN = 1 << 14, 0.05
"""Numbers that stand for others where a bound is chosen, and the shares of all numbers on each side at first."""
DIGITS = 16
INTEGERS = {4: torch.int32, 8: torch.int64}


class KthLargest:
    """The k-th largest of n numbers ≥ 0 that pass by in blocks, as often as `done` is False.

    Blocks of the first pass should come in no order of their sizes, so that those seen are like those to come.
    """

    def __init__(self, k: int, n: int, capacity: int = CAPACITY) -> None:
        """Ask for the k-th largest of n."""
        self.k, self.n, self._capacity = k, n, capacity
        self.value = sys.float_info.max
        """The k-th largest number; the largest of all numbers if k is 0."""
        self.equal = self.wanted = 0
        """The number of equals of it, and of those among the k largest."""
        self.done = k == 0
        self._low, self._high = 0.0, float("inf")
        self._above = self._inside = self._seen = 0
        self._found: list[Tensor] = []
        self._counts: Tensor | None = None
        self._certain = False

    def add(self, numbers: Tensor, single: Tensor | None = None) -> None:
        """Take a block; `single` is scratch space of its shape in float32.

        Rounding to float32 keeps the order, and the bounds are such numbers. So comparisons are of half the size.
        """
        if self._counts is not None:
            self._count(numbers)
            return
        rounded = self._comparable(numbers, single)
        if not self._seen and self.n > self._capacity and not self._certain:
            self._guess(rounded)
        reached, above = rounded >= self._low, rounded > self._high
        self._seen += numbers.numel()
        self._above += int(torch.count_nonzero(above))
        inside = _selected(numbers.reshape(-1), reached.bitwise_xor_(above).view(-1))
        self._inside += len(inside)
        if self._inside - len(inside) <= self._capacity:
            self._found.append(inside)
        if self._inside > self._capacity // 2 and self._seen < self.n:
            self._shrink()

    def _comparable(self, numbers: Tensor, single: Tensor | None) -> Tensor:
        """Return the numbers as the bounds are: rounded to float32, if passes by bits have not set the bounds."""
        if self._certain:
            return numbers
        return numbers.float() if single is None else single.copy_(numbers)

    def _guess(self, rounded: Tensor) -> None:
        """Choose a wide interval by a sample of the first block."""
        share = self.k / self.n
        if share > MARGIN:
            self._high = _about(rounded, share - MARGIN)
        if share + MARGIN < 1:
            self._low = _about(rounded, share + MARGIN)

    def _shrink(self) -> None:
        """Hold a quarter of the numbers that fit, around the rank that is wanted among those seen."""
        if sum(map(len, self._found)) < self._inside:
            return  # too many equal numbers: they were not held
        found, half = torch.cat(self._found), self._capacity // 8
        rounded = found if self._certain else found.float()
        middle = round(self.k * self._seen / self.n) - self._above
        if middle > half:
            self._high = _about(rounded, (middle - half) / len(found))
        if middle + half < len(found):
            self._low = _about(rounded, (middle + half) / len(found))
        self._above += int(torch.count_nonzero(rounded > self._high))
        kept = _selected(found, (rounded >= self._low) & (rounded <= self._high))
        self._found, self._inside = [kept], len(kept)

    def finish(self) -> bool:
        """End a pass; return True if the number is found, else choose a narrower interval for the next pass."""
        if self.done:
            return True
        if self._counts is not None:
            self._narrow()
        elif self._above < self.k <= self._above + self._inside == self._above + sum(map(len, self._found)):
            self._settle()
        else:
            self._restart()
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
        self._found, self._prefix, self._above, self._inside = [], 0, 0, 0
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
            self._counts, self._above, self._inside, self._certain = None, 0, 0, True
        else:
            self._counts.zero_()
            self._shift -= DIGITS

    def _number(self, bits: int) -> float:
        """Return the number with these bits."""
        return float(torch.tensor(bits, dtype=INTEGERS[self._bits // 8]).view(self._like))


def _about(numbers: Tensor, share: float) -> float:
    """Return a number that about a share of some numbers exceeds."""
    sample = numbers.reshape(-1)[:: max(1, numbers.numel() // SAMPLED)]
    rank = min(max(1, round(share * len(sample))), len(sample))
    return float(sample.kthvalue(len(sample) + 1 - rank).values)


def _selected(numbers: Tensor, chosen: Tensor) -> Tensor:
    """Return the numbers that are chosen; if they are few, eight flags are looked at together."""
    if len(numbers) % 8 or 32 * int(torch.count_nonzero(chosen)) > len(numbers):
        return numbers[chosen]
    eights = chosen.view(torch.int64).nonzero().squeeze(1)
    return numbers.view(-1, 8)[eights][chosen.view(-1, 8)[eights]]
