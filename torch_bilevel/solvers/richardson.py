"""Richardson iteration (fixed-point iteration, AID-FP) for positive definite A.

    v ← v + η (b − A v)        so that  r ← (I − η A) r

Converges for 0 < η < 2/λ_max, by max|1 − η λ| a step. Grazzi et al. (2020) call it AID-FP when
A = I − ∂Ψᵀ; with Ψ a gradient step of size η the two agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..kernels import richardson_step
from .base import (
    Memory,
    Operator,
    Solution,
    Solver,
    relative,
    solution,
    start,
)
from .device import advance, by_kernels
from .loops import may_look, may_stop_early, repeat
from .spectrum import largest_eigenvalue


@dataclass(frozen=True)
class Richardson(Solver):
    """Richardson (fixed-point) iteration with a warm start.

    Needs: the symmetric part of A positive definite. Costs: one product a step (one more with
    a warm start; about ten once, to estimate λ_max when ``step_size`` is left out), three vectors.

    Args:
        max_steps: cap on the number of steps.
        step_size: η, in units of 1/curvature; None takes 1/λ̂_max by power iteration at first
            use, and again when divergence is seen.
        rtol: stop when ‖b − A v‖ ≤ rtol·‖b‖; 0 runs all steps.

    Example:
        >>> import torch
        >>> from torch_bilevel.solvers import Operator, Richardson
        >>> A = torch.diag(torch.tensor([1., 2.]))
        >>> solver = Richardson(max_steps=60, step_size=0.6, rtol=0.)
        >>> solver.solve(Operator(A.mv, 2), torch.tensor([1., 1.])).value
        tensor([1.0000, 0.5000])
    """

    max_steps: int = 20
    step_size: float | None = None
    rtol: float = 1e-4

    name: ClassVar[str] = "richardson"

    def __post_init__(self) -> None:
        _checks.positive_int("Richardson", "max_steps", self.max_steps)
        _checks.real(
            "Richardson", "step_size", self.step_size, positive=True, optional=True
        )
        _checks.real("Richardson", "rtol", self.rtol)

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`."""
        x, r = start(operator, b, x0)

        def run(eta: Tensor) -> Solution:
            return iterate(operator, b, x, r, eta, self.max_steps, self.rtol)

        return with_step_size(run, operator, b, self.step_size, memory)


class _State(NamedTuple):
    """The iteration in progress; the best iterate so far with its rᵀr; flags."""

    x: Tensor
    r: Tensor
    rr: Tensor
    best: Tensor
    best_rr: Tensor
    curvature: Tensor
    steps: Tensor
    active: Tensor
    broken: Tensor


def iterate(
    operator: Operator,
    b: Tensor,
    x: Tensor,
    r: Tensor,
    eta: Tensor,
    num_steps: int,
    rtol: float,
    last_product: bool = True,
) -> Solution:
    """``num_steps`` Richardson steps from (x, r = b − A x).

    Args:
        operator: A.
        b: right-hand side.
        x: start.
        r: its residual.
        eta: step size, 0-d.
        num_steps: number of steps.
        rtol: relative tolerance; 0 runs all steps.
        last_product: spend a product on the residual of the last iterate; without it the
            residual reported is that of the iterate before.

    Returns:
        The last iterate, or the one of smallest residual if the iteration diverged.
    """
    if by_kernels(b):
        return _on_device(operator, b, x, r, eta, num_steps, rtol, last_product)
    bb = torch.dot(b, b)
    target = rtol**2 * bb
    rr, cold = torch.dot(r, r), ~x.any()
    zero = torch.zeros_like(rr)
    broken = ~(torch.isfinite(bb) & torch.isfinite(rr))
    first = _State(x, r, rr, x, rr, zero, zero.long(), rr > target, broken)

    def step(state: _State) -> _State:
        x, r, rr, best, best_rr, curvature, steps, active, broken = state
        # x ← x + η r;   r ← r − η A r
        Ar = operator(r)
        along = torch.dot(r, Ar) / rr
        broken = broken | (active & (steps == 0) & ~torch.isfinite(along))
        x = torch.where(active, x + eta * r, x)
        r = torch.where(active, r - eta * Ar, r)
        rr = torch.dot(r, r)
        # one step is better than none
        better = active & ((rr < best_rr) | (cold & (steps == 0)))
        best, best_rr = torch.where(better, x, best), torch.where(better, rr, best_rr)
        curvature, steps = torch.where(active, along, curvature), steps + active
        active = active & ~(rr <= target)
        return _State(x, r, rr, best, best_rr, curvature, steps, active, broken)

    products = num_steps if last_product else num_steps - 1
    early = may_stop_early(b, rtol)
    state = repeat(step, first, products, lambda s: s.active, early)
    x, r, rr, best, best_rr, curvature, steps, active, broken = state
    if not last_product:
        x, steps = torch.where(active, x + eta * r, x), steps + active
    diverged = ~broken & ~(rr <= bb * (1 + 1e-3))
    return solution(
        torch.where(broken, torch.nan, torch.where(diverged, best, x)),
        relative(torch.where(diverged, best_rr, rr).sqrt().reshape(1), b),
        num_steps=steps,
        converged=(rr <= target) & ~broken,
        curvature=curvature,
        diverged=diverged,
    )


def _on_device(
    operator: Operator,
    b: Tensor,
    x: Tensor,
    r: Tensor,
    eta: Tensor,
    num_steps: int,
    rtol: float,
    last_product: bool,
) -> Solution:
    """`iterate` by kernels, with flags on the device."""
    bb = torch.dot(b, b)
    state = richardson_step.started(x, r, eta, rtol**2 * bb, ~x.any())
    products = num_steps if last_product else num_steps - 1
    state, taken = advance(
        operator, state, richardson_step.richardson_step, products, rtol > 0
    )
    state = richardson_step.richardson_step(state, None, taken)
    here = (taken + 1) % 2
    numbers, flags = state.numbers[here], state.flags[here]
    rr, best_rr = numbers[richardson_step.RR], numbers[richardson_step.BEST_RR]
    steps, going = flags[richardson_step.STEPS].long(), flags[richardson_step.GOING] > 0
    value = state.x
    if not last_product:
        value = torch.where(going, value + eta * state.r, value)
        steps = steps + going
    broken = flags[richardson_step.BROKEN] > 0
    diverged = ~broken & ~(rr <= bb * (1 + 1e-3))
    return solution(
        torch.where(broken, torch.nan, torch.where(diverged, state.best, value)),
        relative(torch.where(diverged, best_rr, rr).sqrt().reshape(1), b),
        num_steps=steps,
        converged=~going,
        curvature=numbers[richardson_step.CURVATURE],
        diverged=diverged,
    )


class LastGood:
    """The last iterate of a noisy iteration before its residual grew, should it diverge.

    Args:
        b: right-hand side, what residuals are compared with.
        value: what to use if there is none.
    """

    def __init__(self, b: Tensor, value: Tensor):
        self._bb = torch.dot(b, b)
        self.value = value
        self.curvature = b.new_zeros(())

    def grown(self, r: Tensor, squared: float = 1 + 1e-3) -> Tensor:
        """Whether ‖r‖² exceeds so many times ‖b‖², or is not a number."""
        return ~(torch.dot(r, r) <= self._bb * squared)

    def note(self, value: Tensor, r: Tensor, p: Tensor, Ap: Tensor) -> None:
        """An iterate with its residual; pᵀ A p/pᵀp of the direction whose product was taken."""
        self.value = torch.where(self.grown(r), self.value, value)
        pp = torch.dot(p, p)
        self.curvature = torch.where(pp > 0, torch.dot(p, Ap) / pp, self.curvature)

    def unless(self, diverged: Tensor, value: Tensor) -> Tensor:
        """``value``; where it diverged, and is not lost to inf or NaN, the last good one."""
        return torch.where(diverged & torch.isfinite(value).all(), self.value, value)


def safer_step(
    operator: Operator,
    b: Tensor,
    eta: Tensor | float,
    memory: Memory,
    limit: float = 1.0,
) -> Tensor | None:
    """limit/λ̂_max if η exceeds it; looked at once, with ten products at most.

    Args:
        operator: A; one that is not symmetric is not looked at.
        b: any vector of the right size, dtype and device.
        eta: η.
        memory: says by its eigenvalue that it was looked at.
        limit: of η λ_max.
    """
    if memory.eigenvalue is not None or not operator.symmetric or not may_look():
        return None
    size = largest_eigenvalue(operator, b, memory, max_steps=10)
    return limit * _inverse(size) if bool(size * eta > limit * (1 + 1e-6)) else None


def with_step_size(
    run: Callable[[Tensor], Solution],
    operator: Operator,
    b: Tensor,
    step_size: float | None,
    memory: Memory | None,
    limit: float | None = None,
    estimate: Callable[[Operator, Tensor, Memory], Tensor] = largest_eigenvalue,
    growth: float = 1.05,
) -> Solution:
    """Run with the given or an automatic step size, and say why if it diverges.

    Divergence has two causes: a step above 2/λ_max, or a negative eigenvalue. The first is
    repaired when the step is automatic and reported with a safe step otherwise; the second is
    reported as negative curvature with the best iterate. With a ``limit``, a given η is compared
    once with limit/λ̂_max (at most ten products) and marked as too large for theory. An ``estimate``
    of both ends of the spectrum tells the two causes apart by the sign of the lower one. The second
    estimate must exceed the first by the factor ``growth`` to be tried. Where the host may not look
    (see `may_look`), divergence is a flag and nothing is repaired.
    """
    memory = Memory() if memory is None else memory
    risky = None
    if step_size is not None:
        eta = torch.as_tensor(step_size, dtype=b.dtype, device=b.device)
        risky = None if limit is None else safer_step(operator, b, eta, memory, limit)
    else:
        known = memory.eigenvalue
        eta = _inverse(estimate(operator, b, memory) if known is None else known)
        # I − ∂Ψᵀ of a contraction: 1 converges, more may not
        if not operator.symmetric:
            eta = eta.clamp(max=1.0)
    found = run(eta)
    found.safe_step, found.risky_step = risky, risky is not None
    if not may_look() or not bool(found.diverged):
        return found
    size = estimate(operator, b, memory)
    if step_size is None and bool(size * eta > growth):
        eta = _inverse(size)
        found = run(eta)
        if not bool(found.diverged):
            return found
    found.safe_step = _inverse(size)
    smallest = memory.smallest
    if bool(size * eta < 2 if smallest is None else smallest < 0):
        # |1 − ηλ| > 1 although η < 2/|λ|_max, or λ̂_min < 0: some λ is negative.
        found.diverged = torch.zeros_like(found.diverged)
        found.negative_curvature = torch.ones_like(found.diverged)
        found.curvature = found.curvature if smallest is None else smallest
    return found


def _inverse(value: Tensor) -> Tensor:
    return torch.where(value > 0, 1 / value, torch.ones_like(value))
