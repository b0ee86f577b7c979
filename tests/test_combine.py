"""Combinations of changes: PEFT's merge_utils on dense float64 changes is the oracle, torch.topk that of thresholds."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils

from dora_convert.maths import combine
from dora_convert.maths.block_steps import count_block
from dora_convert.maths.bracket import Bracket, parting
from dora_convert.maths.kth_largest import KthLargest

CPU = torch.device("cpu")
WEIGHTS = [0.7, -0.4, 1.3]


@pytest.fixture
def deltas():
    """Three changes that agree in part, with rows that are zero."""
    torch.manual_seed(0)
    common = torch.randn(37, 53, dtype=torch.float64)
    changes = [common + torch.randn_like(common) * 1.5 for _ in range(3)]
    changes[0][5:9] = changes[1][7:11] = 0
    return changes


def pruned(deltas, density):
    found = []
    for delta in deltas:
        kth = KthLargest(combine.kept_count(density, delta.numel()), delta.numel())
        while not kth.done:
            kth.add(delta.abs())
            kth.finish()
        found.append(combine.prune_(delta.clone(), kth.value))
    return found


def summed(deltas, weights):
    return combine.add_up_(torch.zeros_like(deltas[0]), deltas, weights)


def elected(deltas, weights, majority):
    W, *work = (torch.zeros_like(deltas[0]) for _ in range(3))
    stacked = torch.stack(list(deltas))
    marks = [torch.zeros_like(stacked, dtype=torch.bool), torch.zeros_like(W, dtype=torch.uint8)]
    return combine.elect_(W, stacked, weights, majority, work=work, marks=marks)


def agree(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.987])
def test_pruned_and_elected_as_peft(deltas, density):
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    want = merge_utils.magnitude_prune(deltas, weights, density)
    agree(summed(pruned(deltas, density), WEIGHTS), want)
    for majority in ("total", "frequency"):
        want = merge_utils.ties(deltas, weights, density, majority)
        agree(elected(pruned(deltas, density), WEIGHTS, majority), want)


def test_added_as_peft(deltas):
    want = merge_utils.task_arithmetic(deltas, torch.tensor(WEIGHTS, dtype=torch.float64))
    agree(summed(deltas, WEIGHTS), want)


def test_an_even_vote_is_positive():
    """As in PEFT: +1 and −1 elect +; nothing but zeros adds nothing."""
    deltas = [torch.tensor([[2.0, 0.0]]).double(), torch.tensor([[-2.0, 0.0]]).double()]
    want = merge_utils.ties(deltas, torch.ones(2).double(), 1.0)
    assert elected(deltas, [1, 1], "total").tolist() == want.tolist() == [[2, 0]]


def test_dare_drops_as_many_as_peft():
    """Mean and variance over seeds: those of a Bernoulli mask, divided by its density."""
    delta, density, count = torch.linspace(-2, 3, 40).double().view(4, 10), 0.3, 4000
    drawn = torch.stack(
        [combine.drop_(delta.clone(), combine.random_words(seed, 0, (4, 10), CPU), density) for seed in range(count)]
    )
    sigma = (delta.square() * (1 - density) / density).sqrt()
    assert ((drawn.mean(0) - delta).abs() <= 4.5 * sigma / count**0.5 + 1e-12).all()
    torch.testing.assert_close(drawn.var(0), sigma.square(), rtol=0.12, atol=1e-12)
    kept = drawn.ne(0).double().flatten(1)
    noise = torch.corrcoef(kept[:, delta.flatten() != 0].T)
    assert noise.fill_diagonal_(0).abs().max() < 5 / count**0.5  # neighbours know nothing of each other


def test_della_keeps_large_elements_more_often():
    """Probabilities rise with the rank in the row, and the mean over seeds is the change itself."""
    torch.manual_seed(3)
    delta, density, count = torch.randn(3, 12).double(), 0.4, 6000
    p = combine.probabilities(delta, density)
    ranks = delta.abs().argsort(dim=1).argsort(dim=1)
    torch.testing.assert_close(p, 0.25 + 0.3 * ranks.double() / 11)
    assert torch.allclose(p.mean(1), torch.full((3,), density).double())
    drawn = torch.stack(
        [
            combine.drop_by_rank_(delta.clone(), combine.random_words(seed, 7, (3, 12), CPU), density)
            for seed in range(count)
        ]
    )
    sigma = (delta.square() * (1 - p) / p).sqrt()
    assert ((drawn.mean(0) - delta).abs() <= 4.5 * sigma / count**0.5).all()
    torch.testing.assert_close(drawn.var(0), sigma.square(), rtol=0.15, atol=1e-12)


def test_words_know_no_blocks():
    """A row has the same bits in any block; rows, keys and columns have different ones."""
    whole = combine.random_words(11, 0, (9, 6), CPU)
    assert torch.equal(whole[4:7], combine.random_words(11, 4, (3, 6), CPU))
    assert len(torch.cat([whole, combine.random_words(12, 0, (9, 6), CPU)]).unique()) == 108
    assert combine.random_words(2**63 + 5, 10**6, (1, 3), CPU).tolist() == [[-173092672, 1897152225, 50057986]]


def test_densities_of_one_drop_nothing(deltas):
    words = combine.random_words(0, 0, deltas[0].shape, CPU)
    assert torch.equal(combine.drop_(deltas[0].clone(), words, 1.0), deltas[0])
    assert torch.equal(combine.drop_by_rank_(deltas[0].clone(), words, 1.0), deltas[0])
    assert combine.drop_by_rank_(torch.ones(1, 1).double(), words[:1, :1], 0.9).shape == (1, 1)


# ---- the k-th largest


def search(x, k, *, capacity, height=7):
    """Return the k-th largest as a stream of blocks gives it, and the number of passes."""
    kth, passes = KthLargest(k, x.numel(), capacity), 0
    while not kth.done:
        for block in x.split(height):
            kth.add(block.abs())
        kth.finish()
        passes += 1
    return kth, passes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 2, 977, 1499, 1500])
def test_kth_largest(k, dtype):
    torch.manual_seed(1)
    x = torch.randn(100, 15, dtype=dtype) * torch.linspace(0.1, 3, 100, dtype=dtype)[:, None]
    want = float(x.abs().flatten().topk(k).values[-1])
    for capacity in (2000, 400, 60, 1):
        kth, _ = search(x[torch.randperm(100)], k, capacity=capacity)
        assert (kth.value, kth.equal, kth.wanted) == (want, 1, 1)


def test_blocks_that_are_alike_need_one_pass():
    """Sorted blocks need more, and give the same number."""
    torch.manual_seed(2)
    x = torch.randn(1000, 20).double() * torch.linspace(0.5, 1, 1000)[:, None]
    kth, passes = search(x[torch.randperm(1000)], 9000, capacity=6000, height=100)
    again, more = search(x[x.abs().sum(1).argsort()], 9000, capacity=500)
    assert (passes, kth.value) == (1, again.value)
    assert more > 1


@pytest.mark.parametrize("capacity", [2000, 300, 4])
def test_equal_numbers(capacity):
    """Of a grid's numbers, as bfloat16 leaves them, most are equal."""
    x = (torch.arange(1500).double() % 7).view(100, 15)
    for k in (1, 214, 215, 700, 1499, 1500):
        kth, _ = search(x, k, capacity=capacity)
        want = float(x.flatten().topk(k).values[-1])
        assert kth.value == want
        assert kth.equal == int((x == want).sum())
        assert kth.wanted == k - int((x > want).sum())


def test_none_of_them():
    kth = KthLargest(0, 10)
    assert kth.done
    assert not combine.prune_(torch.ones(2, 5).double(), kth.value).any()


def test_equal_numbers_are_dropped_from_a_place_on():
    x = torch.tensor([[2.0, -1.0, 1.0], [1.0, 3.0, -1.0]]).double()
    assert combine.drop_equal_(x.clone(), 1.0, 3).tolist() == [[2, -1, 1], [0, 3, 0]]
    assert combine.drop_equal_(x.clone(), 1.0, -5).tolist() == [[2, 0, 0], [0, 3, 0]]


# ---- thresholds by approximate magnitudes


def show(bracket, approximate, x, first):
    """Show a bracket some rows, as a change whose product is all of it; the compiled step does what Python does."""
    rows, columns = x.shape
    marks = torch.empty(rows, columns, dtype=torch.bool)
    groups = marks if marks.numel() % 8 else marks.view(-1).view(torch.int64)
    change = [torch.empty(0), torch.eye(rows), approximate]
    found = []
    for step in (count_block.plain, count_block):
        scratch, chosen = torch.empty(2, 5, 7), torch.empty(rows, columns)
        found.append(step(x, change, bracket.bounds, scratch=scratch, chosen=chosen, marks=marks, groups=groups))
    assert found[0][3] == found[1][3]
    assert all(torch.equal(*pair) for pair in zip(found[0][:3], found[1][:3], strict=True))
    sizes, places, weights, above = found[0]
    bracket.take(sizes, places + first, weights, above)


@pytest.mark.parametrize("k", [37, 4000, 7990])
def test_approximate_magnitudes_find_the_largest(k):
    """Magnitudes in float32 and a few in float64 tell the k largest, rows of any size; an error tells who is near."""
    torch.manual_seed(4)
    x = torch.randn(64, 125).double() * torch.linspace(0.1, 3, 64)[:, None]
    approximate = (x * (1 + 1e-5 * torch.rand_like(x))).float()
    bracket = Bracket(k, x.numel())
    assert bracket.choose(approximate.flatten()[::3].abs())
    for first in range(0, 64, 16):
        show(bracket, approximate[first : first + 16], x[first : first + 16].contiguous(), first * 125)
    near = bracket.near(2e-5, 0.0)
    assert torch.equal(x.flatten()[near.places], near.weights)
    value = parting(near.weights.abs(), near.rank, near.error, 1e-15)
    assert int((x.abs() >= value).sum()) == k


def test_bounds_that_hold_no_k_th_largest_are_told():
    """A sample of other numbers misleads; equal numbers cannot be parted."""
    x = torch.arange(1, 1001).float()
    bracket = Bracket(500, 1000)
    assert bracket.choose(x / 2)
    show(bracket, x[:, None], x[:, None], 0)
    assert bracket.near(1e-7, 0.0) is None
    assert bracket.missed
    assert parting(torch.tensor([3.0, 2.0, 2.0, 1.0]), 2, 0.5, 0.0) is None
    assert parting(torch.tensor([1.0, 3.0, 2.0]), 2, 0.5, 0.0) == 1.75
