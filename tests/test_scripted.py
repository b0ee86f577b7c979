"""Functions that TorchScript compiles: the same bytes as Python, no warning, and a way out."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module

import pytest
import torch
from torch import Tensor

from dora_convert.maths.stack import merge_stack
from dora_convert.scripted import Scripted


@Scripted
def twice(x: Tensor, out: list[Tensor], m: Tensor | None) -> bool:
    """Add, as TorchScript knows it."""
    for each in out:
        torch.add(x, x, out=each)
        if m is not None:
            each.mul_(m)
    return bool((x > 0).any())


def test_compiled_and_plain_do_the_same():
    """The attribute `plain` is the function as Python has it."""
    x = torch.randn(3, 5)
    for m in (None, torch.rand(3, 1)):
        one, other = torch.empty_like(x), torch.empty_like(x)
        assert twice(x, [one], m) == twice.plain(x, out=[other], m=m)
        assert torch.equal(one, other)
    assert twice.compiles


def test_all_compile():
    """A function that TorchScript refuses would run as Python, and nobody would see it."""
    for name in ("maths.stack", "parity.stack_facts"):
        module = import_module(f"dora_convert.{name}")
        functions = [each for each in vars(module).values() if isinstance(each, Scripted)]
        assert functions
        assert all(each.compiles for each in functions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("compute", [torch.float64, torch.float32])
def test_a_stack_is_the_same_either_way(dtype, compute):
    """LoRAs and DoRAs, three at a time of five, with a tie of bfloat16 in each."""
    raw, A, B = torch.randn(5 * 16, 32).to(dtype), torch.randn(5, 4, 32), torch.randn(5, 16, 4)
    B[:, 0], raw[::16, 0], A[:, :, 0] = 0, 1, 1
    B[:, 0, 0] = 2.0**-8
    single = torch.empty(3 * 16, 32)
    for m in (None, torch.rand(5 * 16, dtype=compute) + 1):
        found = []
        for merge in (merge_stack, merge_stack.plain):
            scratch = [torch.empty(shape, dtype=compute) for shape in ((48, 32), (3, 4, 32), (3, 16, 4))]
            n, out = torch.zeros(5 * 16, dtype=compute), torch.zeros_like(raw)
            scales = [1.0, 0.5, 2.0, 1.0, 3.0]
            scratch += [single, single.view(torch.int16)]
            assert merge(raw=raw, A=A, B=B, scales=scales, m=m, n=n, scratch=scratch, out=out)
            found.append((n, out))
        assert all(map(torch.equal, *found))
        assert bool(found[0][0].any()) == (m is not None)


def test_no_warning_is_seen_and_filters_stay():
    """torch warns that TorchScript is deprecated, which is no news for a user."""

    def next_one(x: Tensor) -> Tensor:
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        assert Scripted(next_one)(torch.ones(1)).item() == 2
        assert warnings.filters == before


def test_what_does_not_compile_runs_as_python():
    """A generator is no TorchScript; a function without source cannot be compiled either."""

    def odd(x: Tensor) -> Tensor:
        return sum(each for each in x)

    scope = {}
    exec("def bare(x): return x + 1", scope)
    assert Scripted(odd)(torch.ones(3)).item() == 3
    assert Scripted(scope["bare"])(torch.ones(1)).item() == 2
    assert not Scripted(odd).compiles


def test_torch_is_imported_by_the_first_call_alone():
    """Rooms that torch is not imported for may define such functions."""
    code = "import sys, dora_convert.scripted; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
