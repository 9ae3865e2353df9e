"""Conjugate gradients (Hestenes & Stiefel 1952) for symmetric positive definite A.

    x ← x + α p,  r ← r − α A p,  p ← r + β p,   α = rᵀr / pᵀA p,  β = r₊ᵀr₊ / rᵀr

Exact after as many steps as A has distinct eigenvalues; in general the A-norm of the error
falls by (√κ − 1)/(√κ + 1) a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from .base import (
    Memory,
    Operator,
    Solution,
    Solver,
    may_stop_early,
    relative,
    solution,
    start,
)


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients.

    Needs: a symmetric A. When it meets negative curvature it stops at the last good iterate;
    from a zero start, where there is none, at the multiple of b it would have stepped to.
    Costs: one product a step (one more with a warm start) and four vectors. A host
    synchronisation a step unless ``rtol=0``.

    Args:
        max_steps: cap on the number of steps.
        rtol: stop when ‖b − A v‖ ≤ rtol·‖b‖; 0 runs all steps.

    Example:
        >>> import torch
        >>> from torch_bilevel.solvers import CG, Operator
        >>> A = torch.diag(torch.tensor([1., 4.]))
        >>> CG(max_steps=2).solve(Operator(A.mv, 2), torch.tensor([1., 1.])).value
        tensor([1.0000, 0.2500])
    """

    max_steps: int = 20
    rtol: float = 1e-4

    name: ClassVar[str] = "cg"
    needs_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.positive_int("CG", "max_steps", self.max_steps)
        _checks.real("CG", "rtol", self.rtol)

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`."""
        # r = b − A x;  p: search direction;  alpha minimises the A-norm of the error along p
        x, r = start(operator, b, x0)
        p = r
        cold = ~x.any()
        rr = torch.dot(r, r)
        target = self.rtol**2 * torch.dot(b, b)
        active = rr > target
        zero = torch.zeros_like(rr)
        steps = torch.zeros((), dtype=torch.int64, device=b.device)
        negative = torch.zeros_like(active)
        broken = torch.zeros_like(active)
        curvature, scale = zero, zero
        tiny = 10 * torch.finfo(b.dtype).eps
        check = may_stop_early(b, self.rtol)
        for _ in range(self.max_steps):
            if check and not bool(active):
                break
            Ap = operator(p)
            pAp, pp = torch.dot(p, Ap), torch.dot(p, p)
            # Curvature below rounding (against the largest stretch ‖A p‖/‖p‖ seen) counts
            # as zero: the direction carries nothing the precision can resolve.
            stretch = torch.linalg.vector_norm(Ap) / pp.sqrt()
            scale = torch.where(active, torch.maximum(scale, stretch), scale)
            curvature = torch.where(active, pAp / pp, curvature)
            broken = broken | (active & ~torch.isfinite(pAp))
            bad = active & (curvature < -tiny * scale)
            negative = negative | bad
            active = active & (curvature > tiny * scale)
            # Nothing to stop at yet: one step of length |α| along b, the T1–T2 answer.
            stuck = bad & (steps == 0) & cold
            alpha = torch.where(active | stuck, rr / pAp.abs(), zero)
            x = x + alpha * p
            r = r - alpha * Ap
            rr_next = torch.dot(r, r)
            beta = torch.where(active, rr_next / rr, zero)
            p = r + beta * p
            rr = rr_next
            steps = steps + active
            active = active & (rr > target)
        return solution(
            torch.where(broken, torch.nan, x),
            relative(r, b),
            num_steps=steps,
            converged=rr <= target,
            negative_curvature=negative,
            curvature=curvature,
        )
