"""A Richardson step, also a term of the Neumann series, on flat vectors: one launch.

    x ← x + η r,   r ← r − η q,   q = A r

reading three vectors and writing two, 20 bytes a parameter in float32. The inner products rᵀq and
r₊ᵀr₊ come from the same pass and are added up at the beginning of the next step, which then knows
whether the iterate it finds is the best so far, and keeps it as it passes by. Numbers and flags
stay on the device; sums go over programs in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .language import jit, launcher, tl
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

ETA, TARGET, RR, BEST_RR, CURVATURE = range(5)  # numbers
PENDING, COLD, BROKEN, STEPS, GOING = range(5)  # flags


class State(NamedTuple):
    """An iteration in progress; every tensor is written to."""

    x: Tensor
    r: Tensor
    best: Tensor  # the iterate of smallest residual, of those looked at
    numbers: Tensor  # (2, 8): η, target of rᵀr, rᵀr, that of the best, curvature
    flags: Tensor  # (2, 8), int32; both doubled: read in one half, written in the other
    parts: Tensor  # (2, 2, PARTS), doubled

    @property
    def direction(self) -> Tensor:
        """What the next product is of."""
        return self.r

    def going(self, steps: int) -> Tensor:
        """Whether another step would change anything, after so many."""
        return self.flags[steps % 2, GOING]


def started(x: Tensor, r: Tensor, eta: Tensor, target: Tensor, cold: Tensor) -> State:
    """The state before the first step.

    Args:
        x: the start.
        r: its residual.
        eta: η.
        target: of rᵀr.
        cold: whether the start is zero: one step is better than none.
    """
    numbers, flags = r.new_zeros(2, 8), r.new_zeros(2, 8, dtype=torch.int32)
    rr = torch.dot(r, r)
    numbers[0, :4] = torch.stack([eta, target, rr, rr])
    flags[0, COLD], flags[0, GOING] = cold, rr > target
    return State(
        x.clone(), r.clone(), x.clone(), numbers, flags, r.new_zeros(2, 2, PARTS)
    )


def reference(state: State, q: Tensor | None, step: int) -> State:
    """The same by operations of PyTorch; see `richardson_step`."""
    x, r, best, numbers, flags, parts = state
    here, then = step % 2, 1 - step % 2
    eta, target, rr, best_rr, curvature = numbers[here, :5].unbind()
    pending, cold, broken, steps = flags[here, :4].unbind()
    rq, new = parts[here, :, 0].unbind()
    moved, first = pending > 0, steps == 1
    along = rq / torch.where(rr > 0, rr, 1)
    curvature = torch.where(moved, along, curvature)
    broken = (broken > 0) | (moved & first & ~torch.isfinite(along))
    rr = torch.where(moved, new, rr)
    better = moved & ((rr < best_rr) | ((cold > 0) & first))
    best_rr = torch.where(better, rr, best_rr)
    best.copy_(torch.where(better, x, best))
    active = (~(rr <= target)) & (q is not None)
    if q is not None:
        left = r - eta * q
        parts[then, :, 0] = torch.stack([torch.dot(r, q), torch.dot(left, left)])
        x.copy_(torch.where(active, x + eta * r, x))
        r.copy_(torch.where(active, left, r))
    numbers[then, :5] = torch.stack([eta, target, rr, best_rr, curvature])
    flags[then, :5] = torch.stack(
        [active, cold > 0, broken, steps + active, ~(rr <= target)]
    ).to(flags.dtype)
    return state


@jit
def _block(x, r, q, best, at, eta, better, moving, n, WHOLE: tl.constexpr):
    """Keep x as the best, move it and r; rᵀq and r₊ᵀr₊ of a block."""
    here = load_block(x, at, n, WHOLE)
    residual, along = load_block(r, at, n, WHOLE), load_block(q, at, n, WHOLE)
    left = residual - eta * along
    if better:
        store_block(best, at, here, n, WHOLE)
    if moving:
        store_block(x, at, here + eta * residual, n, WHOLE)
        store_block(r, at, left, n, WHOLE)
    return residual * along, left * left


@jit
def _step_kernel(
    x, r, q, best, numbers, flags, numbers_out, flags_out, parts, parts_out, n,
    MOVE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    program, count = tl.program_id(0), tl.num_programs(0)
    eta, target = tl.load(numbers), tl.load(numbers + 1)
    rr, best_rr = tl.load(numbers + 2), tl.load(numbers + 3)
    moved, first = tl.load(flags) != 0, tl.load(flags + 3) == 1
    cold = tl.load(flags + 1) != 0
    # the step before
    along = added(parts, 0, count, PARTS) / tl.where(rr > 0, rr, 1)
    curvature = tl.where(moved, along, tl.load(numbers + 4))
    lost = moved & first & (finite(along) == 0)
    broken = (tl.load(flags + 2) != 0) | lost
    rr = tl.where(moved, added(parts, 1, count, PARTS), rr)
    better = moved & ((rr < best_rr) | (cold & first))
    best_rr = tl.where(better, rr, best_rr)
    going = (rr <= target) == 0
    moving = going & MOVE
    sum_rq = tl.zeros((BLOCK,), x.dtype.element_ty)
    sum_rr = tl.zeros((BLOCK,), x.dtype.element_ty)
    if better | moving:
        for block in range(program, tl.cdiv(n, BLOCK), count):
            start = block * BLOCK
            at = start + tl.arange(0, BLOCK)
            if start + BLOCK <= n:
                found = _block(x, r, q, best, at, eta, better, moving, n, True)
            else:
                found = _block(x, r, q, best, at, eta, better, moving, n, False)
            sum_rq += found[0]
            sum_rr += found[1]
    tl.store(parts_out + program, tl.sum(sum_rq, 0))
    tl.store(parts_out + PARTS + program, tl.sum(sum_rr, 0))
    if program == 0:
        store_four(numbers_out, eta, target, rr, best_rr)
        tl.store(numbers_out + 4, curvature)
        steps = tl.load(flags + 3) + moving.to(tl.int32)
        store_four(flags_out, moving, cold, broken, steps)
        tl.store(flags_out + 4, going.to(tl.int32))


@launcher
def richardson_step(state: State, q: Tensor | None, step: int) -> State:
    """A step in one launch.

    No autotuning: another block would sum in another order. A size rule is not needed: below 1024
    entries it is one program.

    Args:
        state: is moved.
        q: A r, contiguous; None only to look at what the step before has found.
        step: its number, from 0.

    Returns:
        The state.
    """
    x, r, best, numbers, flags, parts = state
    here, then, count = step % 2, 1 - step % 2, grid(r)
    _step_kernel[(count,)](
        x, r, r if q is None else q, best, numbers[here], flags[here], numbers[then],
        flags[then], parts[here], parts[then], r.numel(), q is not None, BLOCK, PARTS,
    )  # fmt: skip
    return state
