"""MINRES (Paige & Saunders 1975) for symmetric A, definite or not.

Lanczos vectors v_j with tridiagonal coefficients (α_j, β_j); a QR factorisation by Givens
rotations (c, s) updated column by column minimises ‖b − A x‖ over the Krylov space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

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
from .loops import may_stop_early, repeat


class _State(NamedTuple):
    """MINRES in progress: x, Lanczos vectors v, directions w; numbers of the rotations; flags."""

    x: Tensor
    v: Tensor
    v_previous: Tensor
    w: Tensor
    w_previous: Tensor
    beta: Tensor
    phi: Tensor
    c: Tensor
    s: Tensor
    delta: Tensor
    epsilon: Tensor
    scale: Tensor
    steps: Tensor
    active: Tensor
    broken: Tensor


@dataclass(frozen=True)
class MINRES(Solver):
    """Minimal residuals: for symmetric systems that may be indefinite.

    The choice when CG reports negative curvature: it solves H v = b for an invertible,
    indefinite H instead of stopping.

    Needs: a symmetric A. Costs: one product a step (one more with a warm start) and seven
    vectors. A host synchronisation a step unless ``rtol=0``.

    Args:
        max_steps: cap on the number of steps.
        rtol: stop when ‖b − A v‖ ≤ rtol·‖b‖; 0 runs all steps.

    Example:
        >>> import torch
        >>> from torch_bilevel.solvers import MINRES, Operator
        >>> A = torch.diag(torch.tensor([1., -4.]))
        >>> MINRES(max_steps=2).solve(Operator(A.mv, 2), torch.tensor([1., 1.])).value
        tensor([ 1.0000, -0.2500])
    """

    max_steps: int = 20
    rtol: float = 1e-4

    name: ClassVar[str] = "minres"
    needs_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.positive_int("MINRES", "max_steps", self.max_steps)
        _checks.real("MINRES", "rtol", self.rtol)

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`."""
        x, r = start(operator, b, x0)
        # beta: norm of the next Lanczos vector;  phi: norm of the residual
        beta = torch.linalg.vector_norm(r)
        target = self.rtol * torch.linalg.vector_norm(b)
        phi = beta
        active = phi > target
        zero = torch.zeros_like(beta)
        v_previous, w, w_previous = (torch.zeros_like(b) for _ in range(3))
        v = torch.where(active, r / beta, zero)
        beta = zero
        c, s, delta, epsilon = -torch.ones_like(zero), zero, zero, zero
        scale, broken = zero, ~(torch.isfinite(target) & torch.isfinite(phi))
        steps = torch.zeros_like(phi, dtype=torch.int64)
        tiny = 10 * torch.finfo(b.dtype).eps

        def step(state: _State) -> _State:
            x, v, v_previous, w, w_previous, beta, phi, c, s, *rest = state
            delta, epsilon, scale, steps, active, broken = rest
            # A v_j = β_j v_{j−1} + α_j v_j + β_{j+1} v_{j+1}
            Av = operator(v)
            scale = torch.maximum(scale, torch.linalg.vector_norm(Av))
            alpha = torch.dot(v, Av)
            broken = broken | (active & ~torch.isfinite(alpha))
            u = Av - alpha * v - beta * v_previous
            beta_next = torch.linalg.vector_norm(u)
            # the new column of T, rotated by the two previous Givens rotations
            epsilon_old = epsilon
            rho = c * delta + s * alpha
            gamma_bar = s * delta - c * alpha
            epsilon = s * beta_next
            delta = -c * beta_next
            gamma = torch.hypot(gamma_bar, beta_next)
            usable = active & (gamma > tiny * scale)
            c = torch.where(usable, gamma_bar / gamma, c)
            s = torch.where(usable, beta_next / gamma, s)
            w_next = (v - epsilon_old * w_previous - rho * w) / gamma
            x = torch.where(usable, x + c * phi * w_next, x)
            phi = torch.where(usable, (s * phi).abs(), phi)
            steps = steps + usable
            # β_{j+1} = 0: the Krylov space is exhausted and x is exact on it
            active = usable & (phi > target) & (beta_next > tiny * scale)
            w_previous, w = w, torch.where(usable, w_next, w)
            v_previous, v = v, torch.where(active, u / beta_next, zero)
            rotation = (c, s, delta, epsilon)
            flags = (scale, steps, active, broken)
            return _State(
                x, v, v_previous, w, w_previous, beta_next, phi, *rotation, *flags
            )

        vectors = (x, v, v_previous, w, w_previous)
        numbers = (beta, phi, c, s, delta, epsilon, scale, steps, active, broken)
        early = may_stop_early(b, self.rtol)
        state = _State(*vectors, *numbers)
        state = repeat(step, state, self.max_steps, lambda s: s.active, early)
        return solution(
            torch.where(state.broken, torch.nan, state.x),
            relative(state.phi.reshape(1), b),
            num_steps=state.steps,
            converged=(state.phi <= target) & ~state.broken,
        )
