"""Find the k-th largest magnitude of a stream of blocks, exactly, without sorting or holding all of them.

A sample of the stream gives an interval that holds the k-th largest. A pass counts the numbers above the interval, and
holds those inside. While the blocks pass by, the interval shrinks around the rank that the number has among those seen
so far. If the number leaves the interval after all, a sample of all blocks chooses another one. If that fails, too,
further passes count the numbers by 16 of their bits at a time, which leads to an interval that is right for certain.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

CAPACITY = 1 << 18
"""Numbers of one stream that are held at most, beside those of a block."""
FEW = 1 << 15
"""So many numbers are held before the interval shrinks, unless fewer are allowed."""
SIGMAS = 4.0
"""Half an interval's width, in standard errors of a share."""
ROUGH = 1 << 12
DIGITS = 16
GROUP = 8
"""Numbers that are looked at together where few are chosen."""
INTEGERS = {4: torch.int32, 8: torch.int64}


class KthLargest:
    """The k-th largest magnitude of n numbers that pass by in blocks, as often as `done` is False.

    Blocks of the first pass should come in no order of their sizes, so that those seen are like those to come.
    """

    def __init__(self, k: int, n: int, capacity: int = CAPACITY) -> None:
        """Ask for the k-th largest of n."""
        self.k, self.n, self._capacity = k, n, capacity
        self.value = sys.float_info.max
        """The k-th largest magnitude; the largest of all numbers if k is 0."""
        self.equal = self.wanted = 0
        """The number of equals of it, and of those among the k largest."""
        self.done = k == 0
        self._low, self._high = 0.0, math.inf  # zeros are never inside
        self._above = self._inside = self._seen = self._blocks = 0
        self._found: list[Tensor] = []
        self._spread = -1.0  # how far the shares of parts differ, beyond chance; negative if nobody looked
        self._sample: list[Tensor] = []
        self._counts: Tensor | None = None
        self._certain = self._again = False

    @property
    def sample_size(self) -> int:
        """The numbers that a sample should have: more cost more than a narrow interval saves."""
        return math.ceil(1.3 * math.pow(self.n, 2 / 3))

    def look(self, sample: Tensor, *, of_all: bool = False) -> None:
        """Choose the first interval by a sample: a row of numbers for each part of the stream.

        Parts that are `of_all` are all there are, so that their differences are no doubt about others.
        """
        share, rounded = self.k / self.n, sample.abs().float()
        rough = _about(rounded.flatten()[:: max(1, sample.numel() // ROUGH)], share)
        shares = rounded.gt(rough).float().mean(dim=1)  # float64 is not on all devices
        chance = share * (1 - share) / sample.shape[1]
        beyond = float(shares.var()) - chance if len(shares) > 1 else 0.0
        self._spread = math.sqrt(max(0.0, beyond))
        error = math.sqrt((chance + (0.0 if of_all else self._spread**2)) / len(sample))
        margin = SIGMAS * error + 1 / sample.numel()
        self._high = _about(rounded, share - margin) if share > margin else math.inf
        self._low = _about(rounded, share + margin) if share + margin < 1 else 0.0

    def add(self, numbers: Tensor, scratch: Sequence[Tensor] = ()) -> None:
        """Take a block; `scratch` is two tensors of its shape in float32.

        Rounding to float32 keeps the order, and the bounds are such numbers. So comparisons are of half the size.
        """
        if self._counts is not None:
            self._count(numbers.abs())
            return
        sizes, chosen = scratch or (torch.empty_like(numbers, dtype=torch.float32) for _ in range(2))
        if self._certain:
            sizes, chosen = numbers.abs(), torch.empty_like(numbers)
        else:
            sizes.copy_(numbers).abs_()
        self._remember(sizes)
        inside = self._between(numbers, sizes, chosen)
        self._above += 0 if self._high == math.inf else _number_of(sizes.gt_(self._high))
        self._seen, self._blocks = self._seen + numbers.numel(), self._blocks + 1
        if self._inside <= self._capacity:
            self._found.append(inside)
        self._inside += len(inside)
        many = min(self._capacity // 2, max(FEW, 6 * self._half()))
        if self._inside > many and self._seen < self.n and not self._certain:
            self._shrink()

    def _remember(self, sizes: Tensor) -> None:
        """Keep a sample of all blocks, in case the interval is wrong."""
        if not self._again and sizes.numel():
            step = max(1, self.n // self.sample_size) | 1
            self._sample.append(sizes.reshape(-1)[::step].clone())

    def _between(self, numbers: Tensor, sizes: Tensor, chosen: Tensor) -> Tensor:
        """Return the magnitudes inside the interval; `chosen` is overwritten."""
        below, above = _below(self._low, sizes.dtype), -_below(-self._high, sizes.dtype)
        torch.ops.aten.hardtanh_backward.grad_input(sizes, sizes, below, above, grad_input=chosen)
        return _selected(numbers.reshape(-1), chosen.view(-1)).abs_()

    def _half(self) -> int:
        """Return how many numbers the wanted rank may be off among those seen."""
        share, rest = self.k / self.n, max(0.0, 1 - self._seen / self.n)
        if self._spread < 0:
            return self._capacity // GROUP
        variance = share * (1 - share) / self._seen + self._spread**2 / self._blocks
        return min(self._capacity // GROUP, math.ceil(SIGMAS * self._seen * math.sqrt(variance * rest)) + GROUP)

    def _shrink(self) -> None:
        """Hold the numbers around the rank that is wanted among those seen."""
        if not self._holds_all:
            return  # too many equal numbers: they were not held
        found, half = torch.cat(self._found), self._half()
        rounded = found if self._certain else found.float()
        middle = round(self.k * self._seen / self.n) - self._above
        if middle > half:
            self._high = _about(rounded, (middle - half) / len(found))
        if middle + half < len(found):
            self._low = _about(rounded, (middle + half) / len(found))
        self._above += int(torch.count_nonzero(rounded > self._high))
        kept = found[(rounded >= self._low) & (rounded <= self._high)]
        self._found, self._inside = [kept], len(kept)

    def finish(self) -> bool:
        """End a pass; return True if the number is found, else choose a narrower interval for the next pass."""
        if self.done:
            return True
        if self._counts is not None:
            self._narrow()
        elif self._above < self.k and self._holds_all and self._reaches:
            self._settle()
        else:
            self._restart()
        return self.done

    @property
    def _holds_all(self) -> bool:
        """True if all numbers inside the interval are held."""
        return self._inside == sum(map(len, self._found))

    @property
    def _reaches(self) -> bool:
        """True if the wanted number is not below the interval."""
        return self._low == 0 or self.k <= self._above + self._inside

    def _settle(self) -> None:
        """Find the number among the held ones; it is zero if they are too few."""
        rank = self.k - self._above
        if rank > self._inside:
            self._end(0.0, self.n - self._above - self._inside, rank - self._inside)
            return
        found = torch.cat(self._found)
        value = found.kthvalue(len(found) + 1 - rank).values
        self._end(float(value), int((found == value).sum()), rank - int((found > value).sum()))

    def end(self, value: float) -> None:
        """Take a number that parts the k largest from all others, found otherwise."""
        self._end(value, 0, 0)

    def _end(self, value: float, equal: int, wanted: int) -> None:
        self.value, self.equal, self.wanted, self.done = value, equal, wanted, True
        self._found, self._sample, self._counts = [], [], None

    def _restart(self) -> None:
        """Choose another interval by the sample of all blocks; if this has been tried, count bits."""
        sample, self._sample = self._sample, []
        can_help = self._holds_all and not self._again and bool(sample)
        self._found, self._above, self._inside, self._seen, self._blocks = [], 0, 0, 0, 0
        self._again = True
        if can_help:
            length = min(map(len, sample))
            self.look(torch.stack([part[:length] for part in sample]), of_all=True)
        else:
            self._begin_counting()

    # ---- the passes that are right for certain: bits of numbers ≥ 0 grow with the numbers

    def _begin_counting(self) -> None:
        """Count all numbers by their highest bits."""
        self._prefix, self._shift = 0, -1
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
    rank = min(max(1, round(share * numbers.numel())), numbers.numel())
    return float(numbers.flatten().kthvalue(numbers.numel() + 1 - rank).values)


def _below(bound: float, dtype: torch.dtype) -> float:
    """Return the greatest number of a dtype below a bound, which is one; 0 below 0, as zeros are not looked for."""
    if bound in (0.0, -math.inf):
        return bound
    return float(torch.nextafter(torch.tensor(bound, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)))


def _number_of(flags: Tensor) -> int:
    """Return the number of ones among zeros and ones; float32 adds up so many exactly."""
    return int(flags.sum()) if flags.numel() < 1 << 24 else int(torch.count_nonzero(flags))


def _selected(numbers: Tensor, chosen: Tensor) -> Tensor:
    """Return the numbers where `chosen` is not zero; where few are, most groups are passed over."""
    if len(numbers) % GROUP:
        return numbers[chosen != 0]
    groups = chosen.view(GROUP, -1)
    hits = groups.amax(dim=0).nonzero().squeeze(1)
    return numbers.view(GROUP, -1).index_select(1, hits)[groups.index_select(1, hits) != 0]
