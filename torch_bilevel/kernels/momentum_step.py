"""A step of descent with momentum, heavy ball or Nesterov's, on flat vectors: one launch.

    x ← x + p,  r ← r − q,  q = A p;    p ← θ p + λ g,
    g = r  (heavy ball)  or  r − θ q  (Nesterov)

reading four vectors and writing three, 28 bytes a parameter in float32, and four more to keep the
best iterate. Inner products are added up at the beginning of the next step, which then knows what
became of this one. Numbers and flags stay on the device; sums go over programs in a fixed order.
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

STEP, MOMENTUM, UPPER, TARGET, RR, START, BEST_RR, CURVATURE = range(8)  # numbers
# flags; the last one is written twice
PENDING, COLD, BROKEN, NEGATIVE, DIVERGED, STEPS, GOING = range(7)


class State(NamedTuple):
    """An iteration in progress; every tensor is written to."""

    x: Tensor
    r: Tensor
    p: Tensor  # the displacement to come
    best: Tensor  # the iterate of smallest residual, of those looked at
    numbers: Tensor  # (2, 8): λ, θ, L, target of rᵀr, rᵀr, at the start, of the best, curvature
    flags: Tensor  # (2, 8), int32; both doubled: read in one half, written in the other
    parts: Tensor  # (2, 4, PARTS), doubled

    @property
    def direction(self) -> Tensor:
        """What the next product is of."""
        return self.p

    def going(self, steps: int) -> Tensor:
        """Whether another step would change anything, after so many."""
        return self.flags[steps % 2, GOING]


def started(
    x: Tensor,
    r: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor],
    upper: Tensor,
    target: Tensor,
    cold: Tensor,
) -> State:
    """The state before the first step.

    Args:
        x: the start.
        r: its residual.
        coefficients: first step size, λ, θ, 0-d.
        upper: L, 0-d.
        target: of rᵀr.
        cold: whether the start is zero: one step is better than none.
    """
    numbers, flags = r.new_zeros(2, 8), r.new_zeros(2, 8, dtype=torch.int32)
    first, step, momentum = coefficients
    rr = torch.dot(r, r)
    numbers[0, :7] = torch.stack([step, momentum, upper, target, rr, rr, rr])
    flags[0, COLD], flags[0, GOING] = cold, rr > target
    flags[0, BROKEN] = ~torch.isfinite(rr)
    parts = r.new_zeros(2, 4, PARTS)
    return State(x.clone(), r.clone(), first * r, x.clone(), numbers, flags, parts)


def reference(
    state: State, q: Tensor | None, step: int, ahead: bool, watch: bool
) -> State:
    """The same by operations of PyTorch; see `momentum_step`."""
    x, r, p, best, numbers, flags, parts = state
    here, then = step % 2, 1 - step % 2
    size, momentum, upper, target, rr, start, best_rr, curvature = numbers[
        here
    ].unbind()
    pending, cold, broken, negative, diverged, steps, going = flags[here, :7].unbind()
    pq, pp, qq, new = parts[here, :, 0].unbind()
    # the step before
    moved, first = pending > 0, steps == 1
    curvature = torch.where(moved, pq / torch.where(pp > 0, pp, 1), curvature)
    lost = moved & ~torch.isfinite(pq) & ~torch.isinf(pp)
    broken = (broken > 0) | lost
    tiny = 10 * torch.finfo(r.dtype).eps
    negative = (negative > 0) | (moved & (curvature < -tiny * upper))
    rr = torch.where(moved, new, rr)
    grown = ~(rr <= 1.01 * start)
    if watch:  # ‖A p‖ ≤ λ_max ‖p‖
        grown = grown | (qq.sqrt() > upper * pp.sqrt())
    diverged = (diverged > 0) | (moved & grown)
    well = ~negative & ~diverged
    better = moved & ((well & (rr < best_rr)) | ((cold > 0) & first))
    best_rr = torch.where(better, rr, best_rr)
    best.copy_(torch.where(better, x, best))
    going = (going > 0) & well & (rr > target)
    moving = going & (q is not None)
    if q is not None:
        left = r - q
        parts[then, :, 0] = torch.stack(
            [torch.dot(a, b) for a, b in ((p, q), (p, p), (q, q), (left, left))]
        )
        g = left - momentum * q if ahead else left
        x.copy_(torch.where(moving, x + p, x))
        r.copy_(torch.where(moving, left, r))
        p.copy_(torch.where(moving, momentum * p + size * g, p))
    numbers[then] = torch.stack(
        [size, momentum, upper, target, rr, start, best_rr, curvature]
    )
    flags[then] = torch.stack(
        [moving, cold > 0, broken, negative, diverged, steps + moving, going, going]
    ).to(flags.dtype)
    return state


@jit
def _block(
    x, r, p, q, best, at, size, momentum, better, moving, n, AHEAD: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Keep x as the best, move all; pᵀq, pᵀp, qᵀq and r₊ᵀr₊ of a block."""
    here = load_block(x, at, n, WHOLE)
    displacement, along = load_block(p, at, n, WHOLE), load_block(q, at, n, WHOLE)
    left = load_block(r, at, n, WHOLE) - along
    if better:
        store_block(best, at, here, n, WHOLE)
    g = left
    if AHEAD:
        g = left - momentum * along
    if moving:
        store_block(x, at, here + displacement, n, WHOLE)
        store_block(r, at, left, n, WHOLE)
        store_block(p, at, momentum * displacement + size * g, n, WHOLE)
    squares = displacement * displacement, along * along, left * left
    return displacement * along, squares[0], squares[1], squares[2]


@jit
def _step_kernel(
    x, r, p, q, best, numbers, flags, numbers_out, flags_out, parts, parts_out, n,
    TINY: tl.constexpr, MOVE: tl.constexpr, AHEAD: tl.constexpr, WATCH: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    program, count = tl.program_id(0), tl.num_programs(0)
    size, momentum, upper = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    target, rr, start = tl.load(numbers + 3), tl.load(numbers + 4), tl.load(numbers + 5)
    best_rr = tl.load(numbers + 6)
    # the step before
    moved, first = tl.load(flags) != 0, tl.load(flags + 5) == 1
    pq, pp = added(parts, 0, count, PARTS), added(parts, 1, count, PARTS)
    curvature = tl.where(moved, pq / tl.where(pp > 0, pp, 1), tl.load(numbers + 7))
    infinite = pp == float("inf")
    lost = moved & (finite(pq) == 0) & (infinite == 0)
    broken = (tl.load(flags + 2) != 0) | lost
    negative = (tl.load(flags + 3) != 0) | (moved & (curvature < -TINY * upper))
    rr = tl.where(moved, added(parts, 3, count, PARTS), rr)
    grown = (rr <= 1.01 * start) == 0
    if WATCH:  # ‖A p‖ ≤ λ_max ‖p‖
        qq = added(parts, 2, count, PARTS)
        grown = grown | (tl.sqrt(qq) > upper * tl.sqrt(pp))
    diverged = (tl.load(flags + 4) != 0) | (moved & grown)
    well = (negative | diverged) == 0
    cold = tl.load(flags + 1) != 0
    better = moved & ((well & (rr < best_rr)) | (cold & first))
    best_rr = tl.where(better, rr, best_rr)
    going = (tl.load(flags + 6) != 0) & well & (rr > target)
    moving = going & MOVE
    # this one
    zero = tl.zeros((BLOCK,), x.dtype.element_ty)
    s_pq, s_pp, s_qq, s_rr = zero, zero, zero, zero
    if better | moving:
        for block in range(program, tl.cdiv(n, BLOCK), count):
            at = block * BLOCK + tl.arange(0, BLOCK)
            if block * BLOCK + BLOCK <= n:
                found = _block(
                    x, r, p, q, best, at, size, momentum, better, moving, n, AHEAD, True
                )
            else:
                found = _block(
                    x,
                    r,
                    p,
                    q,
                    best,
                    at,
                    size,
                    momentum,
                    better,
                    moving,
                    n,
                    AHEAD,
                    False,
                )
            s_pq += found[0]
            s_pp += found[1]
            s_qq += found[2]
            s_rr += found[3]
    tl.store(parts_out + program, tl.sum(s_pq, 0))
    tl.store(parts_out + PARTS + program, tl.sum(s_pp, 0))
    tl.store(parts_out + 2 * PARTS + program, tl.sum(s_qq, 0))
    tl.store(parts_out + 3 * PARTS + program, tl.sum(s_rr, 0))
    if program == 0:
        store_four(numbers_out, size, momentum, upper, target)
        store_four(numbers_out + 4, rr, start, best_rr, curvature)
        store_four(flags_out, moving, cold, broken, negative)
        steps = tl.load(flags + 5) + moving.to(tl.int32)
        store_four(flags_out + 4, diverged, steps, going, going)


@launcher
def momentum_step(
    state: State, q: Tensor | None, step: int, ahead: bool, watch: bool
) -> State:
    """A step in one launch.

    No autotuning: another block would sum in another order. A size rule is not needed: below 1024
    entries it is one program.

    Args:
        state: is moved.
        q: A p, contiguous; None only to look at what the step before has found.
        step: its number, from 0.
        ahead: take the residual at the extrapolated point (Nesterov).
        watch: count λ_max > L, where a product shows it, as divergence.

    Returns:
        The state.
    """
    x, r, p, best, numbers, flags, parts = state
    here, then = step % 2, 1 - step % 2
    tiny = 10 * torch.finfo(r.dtype).eps
    _step_kernel[(grid(r),)](
        x, r, p, r if q is None else q, best, numbers[here], flags[here], numbers[then],
        flags[then], parts[here], parts[then], r.numel(), tiny, q is not None, ahead,
        watch, BLOCK, PARTS,
    )  # fmt: skip
    return state
