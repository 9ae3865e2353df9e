"""Descent with momentum on ½vᵀAv − bᵀv, from bounds μ, L of the spectrum of A.

    y = x + θ (x − x⁻),    x⁺ = y + λ r(x)  (heavy ball)  or  y + λ r(y)  (Nesterov),    r = b − A x

Both obey one law: if 0 ≤ A ≤ L, no residual is larger than that of the start. k steps multiply the
residual's part with eigenvalue h by a polynomial p_k(h), and with q the rate of the method

    |p_k(h)| ≤ (1 + k s) qᵏ ≤ 1  for μ ≤ h ≤ L,    s = (1 − q²)/(1 + q²)  or  1 − q  (Nesterov)

while for h < μ it rises to p_k(0) = 1. A residual that grows therefore says that L is too small
or A indefinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..kernels import momentum_step
from .base import (
    Memory,
    Operator,
    Solution,
    relative,
    solution,
    start,
)
from .device import advance, by_kernels
from .loops import may_stop_early, repeat
from .richardson import with_step_size
from .spectrum import extreme_eigenvalues

MARGIN = 1.05
"""L over λ̂_max. Lanczos finds λ_max from below (by at most 2.1 % on the ten spectra tried), and
heavy ball diverges beyond L + μ, while 5 % more cost 2.5 % more steps."""


class _State(NamedTuple):
    """The descent in progress: x, r, the last displacement p and A p; the best iterate; flags."""

    x: Tensor
    r: Tensor
    p: Tensor
    q: Tensor
    rr: Tensor
    best: Tensor
    best_rr: Tensor
    curvature: Tensor
    steps: Tensor
    active: Tensor
    negative: Tensor
    diverged: Tensor
    broken: Tensor


def check_bounds(
    owner: str, lower: float | None, upper: float | None, rtol: float
) -> None:
    """Raise unless 0 < lower ≤ upper where they are given, and rtol ≥ 0.

    Raises:
        ValueError: otherwise.
    """
    _checks.real(owner, "rtol", rtol)
    _checks.real(owner, "lower", lower, positive=True, optional=True)
    _checks.real(owner, "upper", upper, positive=True, optional=True)
    if lower is not None and upper is not None and lower > upper:
        raise ValueError(
            f"{owner}(lower={lower!r}, upper={upper!r}): lower, the smallest curvature, must not "
            "exceed upper, the largest."
        )


def with_bounds(
    run: Callable[[Tensor, Tensor, bool], Solution],
    operator: Operator,
    b: Tensor,
    lower: float | None,
    upper: float | None,
    smallest_resolved: float,
    memory: Memory | None,
) -> Solution:
    """Run with the given or estimated μ and L; see `with_step_size` for what divergence causes.

    Args:
        run: solves for a given (μ, L), 0-d; whether to give up when λ_max > L shows.
        operator: A.
        b: right-hand side.
        lower: μ; None takes the smallest Ritz value at first use.
        upper: L; None takes the largest, plus the margin, and again when that is seen to be
            too small.
        smallest_resolved: μ/L where A is singular or indefinite.
        memory: carries both estimates between systems.

    Returns:
        The solution.
    """
    memory = Memory() if memory is None else memory
    if lower is None and memory.smallest is None:
        extreme_eigenvalues(operator, b, memory)

    watch = upper is None

    def run_at(eta: Tensor) -> Solution:
        nonlocal watch
        # η = 1/λ̂_max, or 1/L as given
        L = 1 / eta if upper is not None else MARGIN / eta
        mu = smallest_resolved * L
        if lower is not None:
            mu = torch.full_like(L, lower)
        elif memory.smallest is not None:
            mu = torch.where(memory.smallest > 0, memory.smallest, mu)
        found = run(torch.minimum(mu, L), L, watch)
        watch = False  # a second estimate is as good as it gets
        return found

    step = None if upper is None else 1 / upper
    found = with_step_size(
        run_at, operator, b, step, memory, estimate=extreme_eigenvalues, growth=0.0
    )
    if found.safe_step is not None:
        found.safe_step = found.safe_step / MARGIN
    return found


def resolved(max_steps: int, rtol: float) -> float:
    """μ/L such that heavy ball reaches rtol (1e-4 if that is 0) in max_steps: e^(−2 N √(μ/L)).

    Stands in for μ where A has no smallest positive eigenvalue, for μ = 0 does not converge.
    """
    tolerance = min(rtol, 0.5) or 1e-4
    return min(1.0, math.log(1 / tolerance) / (2 * max_steps)) ** 2


def descend(
    operator: Operator,
    b: Tensor,
    x0: Tensor | None,
    coefficients: tuple[Tensor, Tensor, Tensor],
    upper: Tensor,
    watch: bool,
    max_steps: int,
    rtol: float,
    ahead: bool,
) -> Solution:
    """``max_steps`` steps with momentum.

    Args:
        operator: A.
        b: right-hand side.
        x0: start.
        coefficients: first step size, step size λ, momentum θ, 0-d.
        upper: L, 0-d.
        watch: count a product that shows λ_max > L as divergence, although it may
            converge, slowly.
        max_steps: cap on the number of steps.
        rtol: relative tolerance; 0 runs all steps.
        ahead: take the residual at the extrapolated point (Nesterov).

    Returns:
        The last iterate; that of smallest residual, at least one step from zero, if the
        residual grew or pᵀA p < 0 was met.
    """
    # r = b − A x;  p: the last displacement x − x⁻;  q = A p
    first, step, momentum = coefficients
    x, r = start(operator, b, x0)
    if by_kernels(b):
        return _on_device(
            operator,
            b,
            x,
            r,
            coefficients,
            upper,
            watch,
            max_steps,
            rtol,
            ahead,
        )
    p = torch.zeros_like(b)
    rr = rr_start = torch.dot(r, r)
    target = rtol**2 * torch.dot(b, b)
    cold, active, broken = ~x.any(), rr > target, ~torch.isfinite(rr)
    curvature, no = torch.zeros_like(rr), torch.zeros_like(active)
    tiny = 10 * torch.finfo(b.dtype).eps

    def advanced(state: _State) -> _State:
        x, r, p, q, rr, best, best_rr, curvature, steps, *flags = state
        active, negative, diverged, broken = flags
        start = steps == 0
        steps = steps + active
        # p ← θ p + λ r,  with r at x + θ p (ahead), which is r − θ A p, or at x
        g = r - momentum * q if ahead else r
        p = momentum * p + torch.where(start, first, step) * g
        p = torch.where(active, p, 0.0)  # a lane that has stopped stays where it is
        q = operator(p)
        pq, pp = torch.dot(p, q), torch.dot(p, p)
        curvature = torch.where(active, pq / pp, curvature)
        broken = broken | (active & ~torch.isfinite(pq) & ~torch.isinf(pp))
        negative = negative | (active & (curvature < -tiny * upper))
        # x ← x + p,  r ← r − A p
        x, r = x + p, r - q
        rr = torch.dot(r, r)
        grown = ~(rr <= 1.01 * rr_start)
        if watch:  # ‖A p‖ ≤ λ_max ‖p‖
            grown = grown | (torch.linalg.vector_norm(q) > upper * pp.sqrt())
        diverged = diverged | (active & grown)
        active = active & ~negative & ~diverged
        better = active & (rr < best_rr)
        better = better | (start & cold)  # one step is better than none
        best, best_rr = torch.where(better, x, best), torch.where(better, rr, best_rr)
        flags = (active & (rr > target), negative, diverged, broken)
        return _State(x, r, p, q, rr, best, best_rr, curvature, steps, *flags)

    state = _State(x, r, p, p, rr, x, rr, curvature, no.long(), active, no, no, broken)
    early = may_stop_early(b, rtol)
    state = repeat(advanced, state, max_steps, lambda s: s.active, early)
    x, _, _, _, rr, best, best_rr, curvature, steps, *flags = state
    _, negative, diverged, broken = flags
    failed = negative | diverged
    rr = torch.where(failed, best_rr, rr)
    return solution(
        torch.where(broken, torch.nan, torch.where(failed, best, x)),
        relative(rr.sqrt().reshape(1), b),
        num_steps=steps,
        converged=(rr <= target) & ~broken,
        negative_curvature=negative,
        curvature=curvature,
        diverged=diverged & ~negative & ~broken,
    )


def _on_device(
    operator: Operator,
    b: Tensor,
    x: Tensor,
    r: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor],
    upper: Tensor,
    watch: bool,
    max_steps: int,
    rtol: float,
    ahead: bool,
) -> Solution:
    """`descend` by kernels, with flags on the device."""
    target = rtol**2 * torch.dot(b, b)
    state = momentum_step.started(x, r, coefficients, upper, target, ~x.any())
    step = partial(momentum_step.momentum_step, ahead=ahead, watch=watch)
    state, taken = advance(operator, state, step, max_steps, rtol > 0, (ahead, watch))
    state = step(state, None, taken)
    here = (taken + 1) % 2
    numbers, flags = state.numbers[here], state.flags[here] > 0
    negative, broken = flags[momentum_step.NEGATIVE], flags[momentum_step.BROKEN]
    diverged = flags[momentum_step.DIVERGED]
    failed = negative | diverged
    rr, best_rr = numbers[momentum_step.RR], numbers[momentum_step.BEST_RR]
    rr = torch.where(failed, best_rr, rr)
    return solution(
        torch.where(broken, torch.nan, torch.where(failed, state.best, state.x)),
        relative(rr.sqrt().reshape(1), b),
        num_steps=state.flags[here, momentum_step.STEPS].long(),
        converged=(rr <= target) & ~broken,
        negative_curvature=negative,
        curvature=numbers[momentum_step.CURVATURE],
        diverged=diverged & ~negative & ~broken,
    )
