"""Conjugate gradients on the normal equations AᵀA x = Aᵀb (Hestenes & Stiefel 1952), CGNR.

    x ← x + α p,  r ← r − α A p,  z = Aᵀr,  p ← z + β p,    α = zᵀz / ‖A p‖²,  β = z₊ᵀz₊ / zᵀz

The residual is that of A x = b; it never grows and is at most 2((κ − 1)/(κ + 1))ᵏ‖r₀‖, with κ the
ratio of the largest to the smallest singular value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..errors import NonSymmetricSystem
from .base import (
    Memory,
    Operator,
    Solution,
    Solver,
    relative,
    solution,
    start,
)
from .loops import may_stop_early, repeat


class _State(NamedTuple):
    """CGNR in progress: x, r, p; rᵀr and zᵀz; the largest stretch of A; flags."""

    x: Tensor
    r: Tensor
    p: Tensor
    rr: Tensor
    zz: Tensor
    scale: Tensor
    steps: Tensor
    active: Tensor
    broken: Tensor


@dataclass(frozen=True)
class CGNR(Solver):
    """Conjugate gradients on AᵀA: for any A, at the price of a squared condition number.

    Five vectors where `GMRES` stores one a step. Exact in as many steps as A has distinct singular
    values. A singular system gets a least-squares solution.

    Needs: products with Aᵀ. Costs: two products a step (one more with a warm start) and
    five vectors. A host synchronisation a step unless ``rtol=0``.

    Args:
        max_steps: cap on the number of steps.
        rtol: stop when ‖b − A v‖ ≤ rtol·‖b‖; 0 runs all steps.

    Example:
        >>> import torch
        >>> from torch_bilevel.solvers import CGNR, Operator
        >>> A = torch.tensor([[1., 2.], [-2., 1.]])      # AᵀA = 5 I
        >>> operator = Operator(A.mv, 2, symmetric=False, transpose=A.T.mv)
        >>> CGNR(max_steps=1).solve(operator, torch.tensor([1., 0.])).value
        tensor([0.2000, 0.4000])
    """

    max_steps: int = 20
    rtol: float = 1e-4

    name: ClassVar[str] = "cgnr"

    def __post_init__(self) -> None:
        _checks.positive_int("CGNR", "max_steps", self.max_steps)
        _checks.real("CGNR", "rtol", self.rtol)

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`.

        Raises:
            NonSymmetricSystem: A is not symmetric and has no ``transpose``.
        """
        if not operator.symmetric and operator.transpose is None:
            raise NonSymmetricSystem(
                "CGNR() needs products with the transpose of the system, which is not symmetric "
                "and has none. Use 'gmres', which needs products with the system only."
            )
        # r = b − A x;  z = Aᵀr;  p: search direction, conjugate with respect to AᵀA
        x, r = start(operator, b, x0)
        rr = torch.dot(r, r)
        target = self.rtol**2 * torch.dot(b, b)
        active, broken = rr > target, ~torch.isfinite(rr)
        p, zz = torch.zeros_like(b), torch.ones_like(rr)
        scale, zero = torch.zeros_like(rr), torch.zeros_like(rr)
        steps = torch.zeros_like(rr, dtype=torch.int64)
        tiny = 10 * torch.finfo(b.dtype).eps

        def step(state: _State) -> _State:
            x, r, p, rr, zz, scale, steps, active, broken = state
            z = operator.adjoint(r)
            zz_before, zz = zz, torch.dot(z, z)
            p = z + torch.where(active, zz / zz_before, zero) * p
            Ap = operator(p)
            pp, ApAp = torch.dot(p, p), torch.dot(Ap, Ap)
            broken = broken | (active & ~(torch.isfinite(zz) & torch.isfinite(ApAp)))
            # ‖Aᵀr‖ below rounding, against the largest stretch seen: r is what no x can remove
            stretch = torch.sqrt(torch.maximum(ApAp / pp, zz / rr))
            scale = torch.where(active, torch.maximum(scale, stretch), scale)
            active = active & (zz > (tiny * scale) ** 2 * rr) & (ApAp > 0)
            alpha = torch.where(active, zz / ApAp, zero)
            x = x + alpha * p
            r = r - alpha * Ap
            rr = torch.dot(r, r)
            steps = steps + active
            active = active & (rr > target)
            return _State(x, r, p, rr, zz, scale, steps, active, broken)

        state = _State(x, r, p, rr, zz, scale, steps, active, broken)
        early = may_stop_early(b, self.rtol)
        state = repeat(step, state, self.max_steps, lambda s: s.active, early)
        return solution(
            torch.where(state.broken, torch.nan, state.x),
            relative(state.r, b),
            num_steps=state.steps,
            converged=(state.rr <= target) & ~state.broken,
        )
