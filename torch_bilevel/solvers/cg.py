"""Conjugate gradients (Hestenes & Stiefel 1952) for symmetric positive definite A.

    x ← x + α p,  r ← r − α A p,  p ← r + β p,   α = rᵀr / pᵀA p,  β = r₊ᵀr₊ / rᵀr

Exact after as many steps as A has distinct eigenvalues; in general the A-norm of the error
falls by (√κ − 1)/(√κ + 1) a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..kernels import cg_step
from ..kernels.cg_step import unit_of
from .base import (
    Memory,
    Operator,
    Solution,
    Solver,
    relative,
    solution,
    start,
)
from .device import advance, by_kernels, on_host
from .loops import may_look, may_stop_early, repeat


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients.

    Needs: a symmetric A. When it meets negative curvature it stops at the last good iterate;
    from a zero start, where there is none, at the multiple of b it would have stepped to.
    Costs: one product a step (one more with a warm start) and eight vectors; three operations on
    vectors a step. On CUDA two kernels a step; with
    ``rtol > 0`` the host looks at a flag one step late, with ``rtol=0`` at nothing.

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
    batched: ClassVar[bool] = True

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
        if b.dim() > 1 or not may_look():
            return self._masked(operator, b, x0)
        # r = b − A x;  p: search direction
        x, r = start(operator, b, x0)
        # In units of the largest |b|, so that squares of small numbers do not vanish
        size = b.abs().amax() if len(b) else b.new_ones(())
        size = torch.where((size > 0) & torch.isfinite(size), size, 1.0)
        r, b = r / size, b / size
        bb, cold = torch.dot(b, b), ~x.any()
        target = self.rtol**2 * bb
        run = self._on_host if on_host(b) else self._on_device
        moved, r, flags = run(operator, r, target, cold)
        broken, unit = flags.pop("broken"), flags.pop("unit")
        broken = broken | ~torch.isfinite(bb)
        x = torch.where(broken, torch.nan, x + moved * (size / unit))
        converged = (torch.dot(r, r) <= target) & ~broken
        return solution(x, relative(r, b), converged=converged, **flags)

    def _on_host(
        self, operator: Operator, r: Tensor, target: Tensor, cold: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The iteration with numbers in Python, where reading a tensor waits for no device."""
        rows = torch.stack([torch.zeros_like(r), r, r, r])  # x − x₀, r, p, A p
        other, eps = torch.empty_like(rows), torch.finfo(rows.dtype).eps
        unit, goal = torch.ones_like(target), float(target)
        ahead = float(torch.dot(rows[1], rows[1]))
        steps, curvature, scale, negative, broken = 0, 0.0, 0.0, False, False
        for k in range(self.max_steps):
            if not ahead > goal:
                break
            Ap = operator(rows[2])
            unit = unit_of(Ap, rows[2]) if k == 0 else unit
            torch.div(Ap, unit, out=rows[3])
            (rr, _, rAp), (_, pp, pAp), (_, _, ApAp) = _inner_products(rows).tolist()
            if not (rr > goal and pp > 0):
                break
            curvature, stretch = pAp / pp, math.sqrt(ApAp / pp)
            if not math.isfinite(pAp):
                broken = True
                break
            scale = max(scale, stretch)
            # Curvature below rounding (against the largest stretch ‖A p‖/‖p‖ seen) counts as
            # zero: the direction carries nothing the precision can resolve.
            good = curvature > 10 * eps * scale
            negative = curvature < -10 * eps * scale
            # Nothing to stop at yet: one step of length |α| along b, the T1–T2 answer.
            if not (good or (negative and k == 0 and bool(cold))):
                break
            # alpha minimises the A-norm of the error along p
            alpha = rr / abs(pAp)
            # ‖r₊‖² before r₊ is formed; the next inner products give it again, exactly
            next_rr = max(rr + alpha * (alpha * ApAp - 2 * rAp), 0.0)
            ahead = next_rr + 8 * eps * rr if self.rtol else math.inf
            beta = next_rr / rr
            # x + α p,  r − α A p,  r₊ + β p
            moves = [[1, 0, alpha, 0], [0, 1, 0, -alpha], [0, 1, beta, -alpha]]
            torch.mm(rows.new_tensor(moves), rows, out=other[:3])
            rows, other = other, rows
            if not good:
                break
            steps += 1
        return (
            rows[0],
            rows[1],
            {
                "num_steps": torch.tensor(steps),
                "negative_curvature": torch.tensor(negative),
                "curvature": curvature * unit,
                "broken": torch.tensor(broken),
                "unit": unit,
            },
        )

    def _on_device(
        self,
        operator: Operator,
        r: Tensor,
        target: Tensor,
        cold: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The same with flags on the device; see `advance` for when the host looks at them."""
        state, kernels = cg_step.started(r, target, cold), by_kernels(r)
        step = cg_step.cg_step if kernels else cg_step.reference
        early, steps = self.rtol > 0, self.max_steps
        state, taken = advance(operator, state, step, steps, early)
        numbers, flags = state.numbers[taken % 2], state.flags[taken % 2]
        moved, r = state.rows[:2, : state.size]
        unit = numbers[cg_step.UNIT]
        return (
            moved,
            r,
            {
                "num_steps": flags[cg_step.STEPS].long(),
                "negative_curvature": flags[cg_step.NEGATIVE] > 0,
                "curvature": numbers[cg_step.CURVATURE] * unit,
                "broken": flags[cg_step.BROKEN] > 0,
                "unit": unit,
            },
        )

    def _masked(self, operator: Operator, b: Tensor, x0: Tensor | None) -> Solution:
        """The same with flags for branches, on one system or, along leading dimensions, many."""
        size = torch.linalg.vector_norm(b, torch.inf, -1, keepdim=True)
        size = torch.where((size > 0) & torch.isfinite(size), size, 1.0)
        b = b / size
        zero, bb = torch.zeros_like(b), squared(b)
        no = torch.zeros_like(bb, dtype=torch.bool)
        x, r, rr, cold = zero, b, bb, ~no
        if x0 is not None:
            r = b - operator(x0) / size
            better = squared(r) < bb  # not where r is not finite
            x = torch.where(better.unsqueeze(-1), x0, zero)
            r = torch.where(better.unsqueeze(-1), r, b)
            rr, cold = squared(r), ~x.any(-1)
        target, number = self.rtol**2 * bb, torch.zeros_like(bb)
        flags = (rr > target, no, ~torch.isfinite(bb), cold)
        vectors = (zero.clone(), r.clone(), r.clone())  # which steps may write to
        start = _State(*vectors, rr, rr, number, number, number.long(), *flags)
        # below vmap, where many systems are one tensor, the host may look
        early = may_stop_early(b, self.rtol)
        state = repeat(
            lambda s: _step(operator, target, s),
            start,
            self.max_steps,
            lambda s: s.active.any(),
            early,
        )
        moved, _, _, rr, _, _, curvature, steps, _, negative, broken, _ = state
        lost = broken.unsqueeze(-1)
        return solution(
            torch.where(lost, torch.nan, x + moved * size),
            torch.where(rr == 0, rr, (rr / bb).sqrt()),
            num_steps=steps,
            converged=(rr <= target) & ~broken,
            negative_curvature=negative,
            curvature=curvature,
            diverged=no,
        )


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products along the last dimension."""
    return (a * b).sum(-1)


def squared(a: Tensor) -> Tensor:
    """Inner products of vectors with themselves, without a vector of products."""
    return torch.linalg.vector_norm(a, dim=-1).square()


def _step(operator: Operator, target: Tensor, state: _State) -> _State:
    """One step of every system that has not stopped."""
    moved, r, p, rr, pp, scale, curvature, steps, active, *rest = state
    negative, broken, cold = rest
    tiny = 10 * torch.finfo(r.dtype).eps
    Ap = operator(p)
    pAp = dot(p, Ap)
    along = pAp / pp
    stretch = torch.linalg.vector_norm(Ap, dim=-1) / pp.sqrt()
    # squares of a large A may overflow
    scale = torch.fmax(scale, torch.where(torch.isfinite(stretch), stretch, along))
    curvature = torch.where(active, along, curvature)
    broken = broken | (active & ~torch.isfinite(pAp))
    bad = active & (along < -tiny * scale)
    active = active & (along > tiny * scale) & ~broken
    alpha = torch.where(active | (bad & cold), rr / pAp.abs(), 0).unsqueeze(-1)
    # x + α p,  r − α A p,  r₊ + β p
    own = may_look()  # the vectors are the iteration's: no new memory for them
    moved = moved.addcmul_(alpha, p) if own else moved.addcmul(alpha, p)
    r = r.addcmul_(alpha, Ap, value=-1) if own else r.addcmul(alpha, Ap, value=-1)
    next_rr = squared(r)
    beta = torch.where(active, next_rr / rr, 0)
    by = beta.unsqueeze(-1)
    p = p.mul_(by).add_(r) if own else r.addcmul(by, p)
    return _State(
        moved,
        r,
        p,
        next_rr,
        next_rr + beta**2 * pp,  # r₊ is orthogonal to p
        scale,
        curvature,
        steps + active,
        active & (next_rr > target),
        negative | bad,
        broken,
        cold & False,
    )


class _State(NamedTuple):
    """CG in progress: x − x₀, r, p, their squares; the stretch of A; flags."""

    moved: Tensor
    r: Tensor
    p: Tensor
    rr: Tensor
    pp: Tensor
    scale: Tensor
    curvature: Tensor
    steps: Tensor
    active: Tensor
    negative: Tensor
    broken: Tensor
    cold: Tensor


def _inner_products(rows: Tensor) -> Tensor:
    """Those of r, p and A p with each other, (3, 3), from one operation."""
    return rows[1:] @ rows[1:].mT
