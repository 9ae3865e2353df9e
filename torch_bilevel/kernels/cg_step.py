"""A step of conjugate gradients on flat vectors: two launches, all numbers on the device.

    inner products of r, p and q = A p;   α = rᵀr / |pᵀq|,  β = r₊ᵀr₊ / rᵀr
    x ← x + α p,  r ← r − α q,  p ← r + β p

with r₊ᵀr₊ = rᵀr − 2α rᵀq + α² qᵀq, so that one pass over three vectors gives both numbers and
another over four moves them: 40 bytes a parameter in float32. ‖r‖ ≤ rtol ‖b‖, negative curvature
and what is not finite are flags on the device; once the iteration has stopped, a step reads a few
numbers and touches no vector. Sums go over programs in a fixed order: the same bits every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .language import ceil_div, full_precision, jit, launcher, tl
from .reduce import (
    BLOCK,
    PARTS,
    added,
    finite,
    grid,
    load_block,
    store_block,
    store_four,
)

TARGET, UNIT, SCALE, CURVATURE, TINY = range(5)  # numbers
ACTIVE, NEGATIVE, BROKEN, STEPS, COLD, GOING = range(6)  # flags


class State(NamedTuple):
    """An iteration in progress; every tensor is written to."""

    size: int  # n
    rows: Tensor  # x − x₀, r, p and A p; (4, more than n), each row aligned
    other: Tensor | None  # where `reference` puts the next rows
    numbers: Tensor  # (2, 8): target of rᵀr, unit of A, stretch, curvature, 10 ε
    flags: Tensor  # (2, 8), int32; both doubled: read in one half, written in the other
    parts: Tensor  # (5, PARTS)

    @property
    def direction(self) -> Tensor:
        """What the next product is of."""
        return self.rows[2, : self.size]

    def going(self, steps: int) -> Tensor:
        """Whether another step would change anything, after so many."""
        return self.flags[steps % 2, GOING]


def started(r: Tensor, target: Tensor, cold: Tensor) -> State:
    """The state before the first step.

    Args:
        r: the residual of the start.
        target: of rᵀr.
        cold: whether the start is zero.
    """
    n = r.numel()
    width = 16 * ceil_div(n, 16)
    rows = r.new_zeros(4, width)
    rows[1:3, :n] = r
    numbers, flags = r.new_zeros(2, 8), r.new_zeros(2, 8, dtype=torch.int32)
    numbers[0, TARGET] = target
    # a number that is assigned makes the host wait for the device
    numbers[0, UNIT].fill_(1)
    numbers[0, TINY].fill_(10 * torch.finfo(r.dtype).eps)
    flags[0, ACTIVE] = flags[0, GOING] = torch.dot(r, r) > target
    flags[0, COLD] = cold
    return State(n, rows, None, numbers, flags, r.new_zeros(5, PARTS))


def reference(state: State, q: Tensor, step: int) -> State:
    """The same by operations of PyTorch, three of them on vectors; see `cg_step`."""
    n, rows, other, numbers, flags, _ = state
    other = torch.zeros_like(rows) if other is None else other
    here, then = step % 2, 1 - step % 2
    if step == 0:
        numbers[0, UNIT] = unit_of(q, state.direction)
    target, unit, scale, curvature, tiny, *_ = numbers[here].unbind()
    active, negative, broken, steps, cold, *_ = flags[here].unbind()
    torch.div(q, unit, out=rows[3, :n])
    with full_precision(rows.device):
        rr, _, rq, _, pp, pq, _, _, qq = (rows[1:] @ rows[1:].mT).flatten()
    active = (active > 0) & (rr > target)
    along = pq / pp
    scale = torch.fmax(scale, (qq / pp).sqrt())
    curvature = torch.where(active, along, curvature)
    broken = (broken > 0) | (active & ~torch.isfinite(pq))
    bad = active & (along < -tiny * scale)
    active = active & (along > tiny * scale) & ~broken
    steady = active | (bad & (cold > 0))
    alpha = torch.where(steady, rr / pq.abs(), 0)
    ahead = (rr + alpha * (alpha * qq - 2 * rq)).clamp_min(0)
    beta = torch.where(active, ahead / rr, 0)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    moves = [one, zero, alpha, zero, zero, one, zero, -alpha, zero, one, beta, -alpha]
    with full_precision(rows.device):
        torch.mm(torch.stack(moves).view(3, 4), rows, out=other[:3])
    going = active & (ahead + 0.8 * tiny * rr > target)
    numbers[then, :5] = torch.stack([target, unit, scale, curvature, tiny])
    flags[then, :6] = torch.stack(
        [active, (negative > 0) | bad, broken, steps + active, cold * 0, going]
    ).to(flags.dtype)
    return state._replace(rows=other, other=rows)


def unit_of(q: Tensor, p: Tensor) -> Tensor:
    """The size of A, in which A p is measured: squares of a small A would vanish."""
    unit = q.abs().amax() / p.abs().amax()
    return torch.where((unit > 0) & torch.isfinite(unit), unit, 1.0)


@jit
def _products_of(r, p, q, at, unit, n, WHOLE: tl.constexpr):
    a, b = load_block(r, at, n, WHOLE), load_block(p, at, n, WHOLE)
    c = load_block(q, at, n, WHOLE) / unit
    return a * a, a * c, b * b, b * c, c * c


@jit
def _inner_products_kernel(
    r, p, q, numbers, flags, parts, n, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    program = tl.program_id(0)
    unit = tl.load(numbers + 1)
    zero = tl.zeros((BLOCK,), r.dtype.element_ty)
    rr, rq, pp, pq, qq = zero, zero, zero, zero, zero
    if tl.load(flags) != 0:
        for block in range(program, tl.cdiv(n, BLOCK), tl.num_programs(0)):
            at = block * BLOCK + tl.arange(0, BLOCK)
            if block * BLOCK + BLOCK <= n:
                found = _products_of(r, p, q, at, unit, n, True)
            else:
                found = _products_of(r, p, q, at, unit, n, False)
            rr += found[0]
            rq += found[1]
            pp += found[2]
            pq += found[3]
            qq += found[4]
    tl.store(parts + program, tl.sum(rr, 0))
    tl.store(parts + PARTS + program, tl.sum(rq, 0))
    tl.store(parts + 2 * PARTS + program, tl.sum(pp, 0))
    tl.store(parts + 3 * PARTS + program, tl.sum(pq, 0))
    tl.store(parts + 4 * PARTS + program, tl.sum(qq, 0))


@jit
def _move_block(x, r, p, q, at, alpha, beta, unit, n, WHOLE: tl.constexpr):
    direction = load_block(p, at, n, WHOLE)
    store_block(x, at, load_block(x, at, n, WHOLE) + alpha * direction, n, WHOLE)
    left = load_block(r, at, n, WHOLE) - alpha * (load_block(q, at, n, WHOLE) / unit)
    store_block(r, at, left, n, WHOLE)
    store_block(p, at, left + beta * direction, n, WHOLE)


@jit
def _move_kernel(
    x, r, p, q, numbers, flags, numbers_out, flags_out, parts, n,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    program, count = tl.program_id(0), tl.num_programs(0)
    target, unit = tl.load(numbers), tl.load(numbers + 1)
    scale, tiny = tl.load(numbers + 2), tl.load(numbers + 4)
    rr, rq = added(parts, 0, count, PARTS), added(parts, 1, count, PARTS)
    pp, pq = added(parts, 2, count, PARTS), added(parts, 3, count, PARTS)
    qq = added(parts, 4, count, PARTS)
    active = (tl.load(flags) != 0) & (rr > target)
    along = pq / tl.where(pp > 0, pp, 1)
    # the larger one, also where the other is not a number
    stretch = tl.sqrt(qq / tl.where(pp > 0, pp, 1))
    scale = tl.where(stretch > scale, stretch, scale)
    curvature = tl.where(active, along, tl.load(numbers + 3))
    broken = (tl.load(flags + 2) != 0) | (active & (finite(pq) == 0))
    # curvature below rounding, against the largest stretch ‖A p‖/‖p‖ seen, counts as zero
    bad = active & (along < -tiny * scale)
    active = active & (along > tiny * scale) & (broken == 0)
    # from zero, where there is no good iterate to stop at, one step along b
    steady = active | (bad & (tl.load(flags + 4) != 0))
    alpha = tl.where(steady, rr / tl.where(pq == 0, 1, tl.abs(pq)), 0)
    ahead = tl.maximum(rr + alpha * (alpha * qq - 2 * rq), 0)
    beta = tl.where(active, ahead / tl.where(rr > 0, rr, 1), 0)
    if steady:
        for block in range(program, tl.cdiv(n, BLOCK), count):
            at = block * BLOCK + tl.arange(0, BLOCK)
            if block * BLOCK + BLOCK <= n:
                _move_block(x, r, p, q, at, alpha, beta, unit, n, True)
            else:
                _move_block(x, r, p, q, at, alpha, beta, unit, n, False)
    if program == 0:
        store_four(numbers_out, target, unit, scale, curvature)
        tl.store(numbers_out + 4, tiny)
        negative = (tl.load(flags + 1) != 0) | bad
        steps = tl.load(flags + 3) + active.to(tl.int32)
        store_four(flags_out, active, negative, broken, steps)
        going = active & (ahead + 0.8 * tiny * rr > target)
        tl.store(flags_out + 4, 0)
        tl.store(flags_out + 5, going.to(tl.int32))


@launcher
def cg_step(state: State, q: Tensor, step: int) -> State:
    """A step in two launches.

    No autotuning: another block would sum in another order. A size rule is not needed: below 1024
    entries it is one program.

    Args:
        state: is moved.
        q: A p, contiguous.
        step: its number, from 0.

    Returns:
        The state.
    """
    n, rows, _, numbers, flags, parts = state
    x, r, p = (row[:n] for row in rows[:3])
    if step == 0:
        numbers[0, UNIT] = unit_of(q, p)
    here, then, count = step % 2, 1 - step % 2, grid(r)
    _inner_products_kernel[(count,)](
        r, p, q, numbers[here], flags[here], parts, n, BLOCK, PARTS
    )
    _move_kernel[(count,)](
        x, r, p, q, numbers[here], flags[here], numbers[then], flags[then], parts, n,
        BLOCK, PARTS,
    )  # fmt: skip
    return state
