"""Inner products over programs: each leaves its part, each adds up all parts in the same order."""

from __future__ import annotations

from torch import Tensor

from .language import ceil_div, jit, programs, tl

BLOCK = 1024  # entries of a vector that a program takes at once
PARTS = 512  # most programs


@jit
def load_block(vector, at, n, WHOLE: tl.constexpr):
    """A block of a vector; unmasked, hence in 128-bit loads for any n, where it is whole."""
    if WHOLE:
        found = tl.load(vector + at)
    else:
        found = tl.load(vector + at, mask=at < n, other=0)
    return found


@jit
def store_block(vector, at, value, n, WHOLE: tl.constexpr):
    """The same for storing."""
    if WHOLE:
        tl.store(vector + at, value)
    else:
        tl.store(vector + at, value, mask=at < n)


@jit
def added(parts, number, count, PARTS: tl.constexpr):
    """Inner product number ``number`` from the parts of all programs."""
    at = tl.arange(0, PARTS)
    return tl.sum(tl.load(parts + number * PARTS + at, mask=at < count, other=0), 0)


@jit
def store_four(at, a, b, c, d):
    """Four numbers or flags side by side."""
    tl.store(at, a.to(at.dtype.element_ty))
    tl.store(at + 1, b.to(at.dtype.element_ty))
    tl.store(at + 2, c.to(at.dtype.element_ty))
    tl.store(at + 3, d.to(at.dtype.element_ty))


@jit
def finite(number):
    """Whether a number is neither infinite nor NaN."""
    return tl.abs(number) < float("inf")


def grid(vector: Tensor) -> int:
    """How many programs go through a vector; the same for the same size, as its sums are."""
    return programs(vector, min(PARTS, ceil_div(vector.numel(), BLOCK)), 4)
