"""Conjugate gradients (Hestenes & Stiefel 1952) for symmetric positive definite A.

    x ← x + α p,  r ← r − α A p,  p ← r + β p,   α = rᵀr / pᵀA p,  β = r₊ᵀr₊ / rᵀr

Exact after as many steps as A has distinct eigenvalues; in general the A-norm of the error
falls by (√κ − 1)/(√κ + 1) a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    relative,
    solution,
    start,
)


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients.

    Needs: a symmetric A. When it meets negative curvature it stops at the last good iterate;
    from a zero start, where there is none, at the multiple of b it would have stepped to.
    Costs: one product a step (one more with a warm start) and eight vectors; three operations on
    vectors a step. A host synchronisation a step unless ``rtol=0``.

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
        cold = ~x.any()
        rows, other = torch.stack([x, r, r, r]), b.new_empty(4, len(b))  # x, r, p, A p
        target = self.rtol**2 * torch.dot(b, b)
        zero = torch.zeros_like(target)
        active = going = torch.dot(r, r) > target
        steps = torch.zeros((), dtype=torch.int64, device=b.device)
        negative = broken = torch.zeros_like(active)
        curvature, scale = zero, zero
        eps = torch.finfo(b.dtype).eps
        still, by_alpha, by_beta = _moves(b)
        with full_precision(b.device):
            for k in range(self.max_steps):
                if self.rtol and not bool(going):
                    break
                rows[3] = operator(rows[2])
                # every inner product of r, p and A p at once
                rr, _, rAp, _, pp, pAp, _, _, ApAp = (rows[1:] @ rows[1:].mT).flatten()
                active = active & (rr > target)
                # Curvature below rounding (against the largest stretch ‖A p‖/‖p‖ seen) counts
                # as zero: the direction carries nothing the precision can resolve.
                here = pAp / pp
                scale = torch.fmax(scale, (ApAp / pp).sqrt())
                curvature = torch.where(active, here, curvature)
                broken = broken | (active & ~torch.isfinite(pAp))
                bad = active & (here < -10 * eps * scale)
                negative = negative | bad
                active = active & (here > 10 * eps * scale)
                # Nothing to stop at yet: one step of length |α| along b, the T1–T2 answer.
                steady = active | (bad & cold) if k == 0 else active
                alpha = torch.where(steady, rr / pAp.abs(), zero)
                # ‖r₊‖² before r₊ is formed; the next inner products give it again, exactly
                ahead = (rr + alpha * (alpha * ApAp - 2 * rAp)).clamp_min(0)
                beta = torch.where(active, ahead / rr, zero)
                # x + α p,  r − α A p,  r₊ + β p
                moves = still + alpha * by_alpha + beta * by_beta
                torch.mm(moves, rows, out=other[:3])
                rows, other = other, rows
                steps = steps + active
                going = active & (ahead + 8 * eps * rr > target)
        x, r = rows[0].clone(), rows[1]
        return solution(
            torch.where(broken, torch.nan, x),
            relative(r, b),
            num_steps=steps,
            converged=torch.dot(r, r) <= target,
            negative_curvature=negative,
            curvature=curvature,
        )


def _moves(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The step (x, r, p, A p) ↦ (x + α p, r − α A p, r − α A p + β p) as M_0 + α M_1 + β M_2."""
    still = b.new_tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]])
    by_alpha = b.new_tensor([[0, 0, 1, 0], [0, 0, 0, -1], [0, 0, 0, -1]])
    by_beta = b.new_tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]])
    return still, by_alpha, by_beta


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inner products by matrix products, not in TF32, whatever the user allows their model."""
    if device.type != "cuda" or not torch.backends.cuda.matmul.allow_tf32:
        yield
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = True
