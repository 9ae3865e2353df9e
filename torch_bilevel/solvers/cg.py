"""Conjugate gradients (Hestenes & Stiefel 1952) for symmetric positive definite A.

    x ← x + α p,  r ← r − α A p,  p ← r + β p,   α = rᵀr / pᵀA p,  β = r₊ᵀr₊ / rᵀr

Exact after as many steps as A has distinct eigenvalues; in general the A-norm of the error
falls by (√κ − 1)/(√κ + 1) a step.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
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
        rows = torch.stack([torch.zeros_like(r), r, r, r])
        here, there = _Rows.of(rows), _Rows.of(torch.empty_like(rows))
        products, eps = r.new_empty(3, 3), torch.finfo(r.dtype).eps
        unit, goal = torch.ones_like(target), float(target)
        ahead = float(torch.dot(r, r))
        steps, curvature, scale, negative, broken = 0, 0.0, 0.0, False, False
        for k in range(self.max_steps):
            if not ahead > goal:
                break
            Ap = operator(here.p)
            unit = unit_of(Ap, here.p) if k == 0 else unit
            torch.div(Ap, unit, out=here.Ap)
            torch.mm(here.last, here.transposed, out=products)
            (rr, _, rAp), (_, pp, pAp), (_, _, ApAp) = products.tolist()
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
            torch.mm(products.new_tensor(moves), here.all, out=there.first)
            here, there = there, here
            if not good:
                break
            steps += 1
        return (
            here.all[0],
            here.all[1],
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
        size = b.abs().amax(-1, keepdim=True) if b.shape[-1] else b.new_ones(())
        size = torch.where((size > 0) & torch.isfinite(size), size, 1.0)
        r = b / size
        rr = bb = squared(r)
        no = torch.zeros_like(bb, dtype=torch.bool)
        x, cold = None, ~no
        if x0 is not None:
            from_x0 = r - operator(x0) / size
            better = (squared(from_x0) < bb).unsqueeze(-1)  # not where it is not finite
            x = torch.where(better, x0, 0.0)
            r = torch.where(better, from_x0, r)
            rr, cold = squared(r), ~x.any(-1)
        target, number = self.rtol**2 * bb, torch.zeros_like(bb)
        flags = (rr > target, no, ~torch.isfinite(bb), cold)
        numbers: Any = (target, rr, rr, number, number, number.long(), *flags)
        # below vmap, where many systems are one tensor, the host may look
        early = may_stop_early(b, self.rtol)
        known_to_numpy = b.dtype in (torch.float32, torch.float64)
        if _may_write() and on_host(b) and known_to_numpy:
            numbers = (tensor.numpy() for tensor in numbers)
        goal, *numbers = numbers
        vectors = (torch.zeros_like(r), r, r.clone())  # which steps may write to
        state = repeat(
            lambda s: _step(operator, goal, s),
            _State(*vectors, *numbers),
            self.max_steps,
            lambda s: s.active.any(),
            early,
        )
        moved, _, _, *numbers = state
        rr, _, _, curvature, steps, _, negative, broken, _ = map(
            torch.as_tensor, numbers
        )
        moved = moved * torch.where(broken.unsqueeze(-1), torch.nan, size)
        return solution(
            moved if x is None else x + moved,
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


def _step(operator: Operator, target: Any, state: _State) -> _State:
    """One step of every system that has not stopped.

    The numbers of the systems are NumPy arrays where the host may look: operations on so few cost
    it a third of what they cost PyTorch.
    """
    moved, r, p, rr, pp, scale, curvature, steps, active, *rest = state
    negative, broken, cold = rest
    tiny = 10 * torch.finfo(r.dtype).eps
    host = isinstance(rr, np.ndarray)
    xp: Any = np if host else torch
    Ap = operator(p)
    pAp, length = dot(p, Ap), torch.linalg.vector_norm(Ap, dim=-1)
    if host:
        pAp, length = pAp.numpy(), length.numpy()
    with _quiet(host):
        along, stretch = pAp / pp, length / xp.sqrt(pp)
        # squares of a large A may overflow
        scale = xp.fmax(scale, xp.where(xp.isfinite(stretch), stretch, along))
        curvature = xp.where(active, along, curvature)
        finite = xp.isfinite(pAp)
        good = active & finite & (along > tiny * scale)
        moves = good
        if not host or (good != active).any():  # some system stops here
            broken = broken | (active & ~finite)
            bad = active & (along < -tiny * scale)
            negative, moves = negative | bad, good | (bad & cold)
        alpha = _column(xp.where(moves, rr / abs(pAp), 0))
    # x + α p,  r − α A p,  r₊ + β p
    own = _may_write()  # the vectors are the iteration's: no new memory for them
    moved = moved.addcmul_(alpha, p) if own else moved.addcmul(alpha, p)
    r = r.addcmul_(alpha, Ap, value=-1) if own else r.addcmul(alpha, Ap, value=-1)
    next_rr = squared(r)
    if host:
        next_rr = next_rr.numpy()
    with _quiet(host):
        beta = xp.where(good, next_rr / rr, 0)
        pp = next_rr + beta * beta * pp  # r₊ is orthogonal to p
    by = _column(beta)
    p = torch.addcmul(r, by, p, out=p) if own else r.addcmul(by, p)
    return _State(
        moved,
        r,
        p,
        next_rr,
        pp,
        scale,
        curvature,
        steps + good,
        good & (next_rr > target),
        negative,
        broken,
        cold & False,
    )


def _may_write() -> bool:
    """Whether neither a transform nor autograd is to see every operation."""
    return may_look() and not torch.is_grad_enabled()


def _quiet(host: bool) -> Any:
    """A region in which NumPy divides by zero as PyTorch does."""
    return np.errstate(all="ignore") if host else contextlib.nullcontext()


def _column(numbers: Any) -> Tensor:
    """A number for each system, to multiply vectors with."""
    if isinstance(numbers, np.ndarray):
        return torch.from_numpy(numbers[..., None])
    return numbers.unsqueeze(-1)


class _State(NamedTuple):
    """CG in progress: x − x₀, r, p; squares of r and p; the stretch of A; flags."""

    moved: Tensor
    r: Tensor
    p: Tensor
    rr: Any  # tensors or arrays, a number for each system
    pp: Any
    scale: Any
    curvature: Any
    steps: Any
    active: Any
    negative: Any
    broken: Any
    cold: Any


class _Rows(NamedTuple):
    """Rows x − x₀, r, p, A p, and views of them, made once."""

    all: Tensor
    first: Tensor
    last: Tensor
    transposed: Tensor
    p: Tensor
    Ap: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _Rows:
        last = rows[1:]
        return cls(rows, rows[:3], last, last.mT, rows[2], rows[3])
