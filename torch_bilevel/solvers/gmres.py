"""GMRES (Saad & Schultz 1986): minimal residuals for any invertible A.

    A V_k = V_{k+1} H_k  (Arnoldi),     y = argmin ‖ ‖r₀‖ e₁ − H_k y ‖,     x = x₀ + V_k y

H_k is made triangular by one Givens rotation a step, which also gives the residual.
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
    relative,
    solution,
    start,
)
from .krylov import orthogonalise, small_dtype
from .loops import may_stop_early


@dataclass(frozen=True)
class GMRES(Solver):
    """Generalised minimal residuals: for systems that need be neither symmetric nor definite.

    The smallest residual of any vector in the Krylov space, so it never grows. Exact after as
    many steps as A has distinct eigenvalues (if it is diagonalisable; after n in any case). For a
    symmetric A, `MINRES` computes the same with seven vectors.

    Needs: an invertible A. Costs: one product a step (one more with a warm start and for each
    further cycle), and **memory for max_steps + 1 vectors**; the k-th step also reads k of
    them four times. A host synchronisation a step unless ``rtol=0``.

    Args:
        max_steps: dimension of the Krylov space, the cap on the steps of a cycle.
        rtol: stop when ‖b − A v‖ ≤ rtol·‖b‖; 0 runs all steps.
        restarts: how many Krylov spaces to build in turn, each from the last iterate and in
            the same memory; 1 is GMRES without restart. Small ones can stagnate.

    Example:
        >>> import torch
        >>> from torch_bilevel.solvers import GMRES, Operator
        >>> A = torch.tensor([[1., 2.], [-2., 1.]])
        >>> operator = Operator(A.mv, 2, symmetric=False)
        >>> GMRES(max_steps=2).solve(operator, torch.tensor([1., 0.])).value
        tensor([0.2000, 0.4000])
    """

    max_steps: int = 20
    rtol: float = 1e-4
    restarts: int = 1

    name: ClassVar[str] = "gmres"

    def __post_init__(self) -> None:
        _checks.positive_int("GMRES", "max_steps", self.max_steps)
        _checks.positive_int("GMRES", "restarts", self.restarts)
        _checks.real("GMRES", "rtol", self.rtol)

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`."""
        x, r = start(operator, b, x0)
        target = self.rtol * torch.linalg.vector_norm(b)
        total = torch.zeros_like(target, dtype=torch.int64)
        phi = torch.linalg.vector_norm(r)
        finite = torch.isfinite(phi)
        check = may_stop_early(b, self.rtol)
        for cycle in range(self.restarts):
            if cycle:
                if check and bool(phi <= target):
                    break
                r = b - operator(x)
            x, phi, steps = minimise(operator, x, r, target, self.max_steps, check)
            total = total + steps
        return solution(
            x,
            relative(phi.reshape(1).to(b.dtype), b),
            num_steps=total,
            converged=(phi <= target) & finite,
        )


def minimise(
    operator: Operator,
    x: Tensor,
    r: Tensor,
    target: Tensor,
    max_steps: int,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One cycle: the x + V y of smallest residual.

    Args:
        operator: A.
        x: start.
        r: its residual.
        target: stop at this norm of the residual.
        max_steps: dimension of the Krylov space.
        check: look at flags and stop early.

    Returns:
        The solution, the norm of its residual, and the number of steps.
    """
    size = min(max_steps, r.numel())
    beta = torch.linalg.vector_norm(r)
    V = r.new_zeros(size + 1, r.numel())
    small = {"dtype": small_dtype(r), "device": r.device}
    # Q: the rotations so far;  R = Q H, triangular;  (g, phi) = Q ‖r₀‖ e₁, phi: the residual
    # in-place under vmap: made from r, they have a lane each
    Q, R = (r.new_zeros(n, n, **small) for n in (size + 1, size))
    for square in (Q, R):
        square.diagonal().fill_(1.0)
    g, phi = r.new_zeros(size, **small), beta.to(small["dtype"])
    active = (phi > target) | ~torch.isfinite(phi)
    V[0] = torch.where(active, r / beta, 0.0)
    scale, broken = torch.zeros_like(phi), torch.zeros_like(active)
    steps = torch.zeros_like(phi, dtype=torch.int64)
    tiny = 10 * torch.finfo(r.dtype).eps
    for j in range(size):
        if check and not bool(active):
            break
        # A v_j = h_0 v_0 + … + h_j v_j + h_next v_{j+1}
        w = operator(V[j])
        scale = torch.maximum(scale, torch.linalg.vector_norm(w))
        w, h = orthogonalise(w, V[: j + 1])
        h_next = torch.linalg.vector_norm(w)
        broken = broken | (active & ~torch.isfinite(h_next))
        # the new column, rotated by the rotations so far and by one that removes h_next
        column = Q[: j + 1, : j + 1] @ h.to(**small)
        gamma = torch.hypot(column[j], h_next)
        usable = active & (gamma > tiny * scale)
        c = torch.where(usable, column[j] / gamma, 1.0)
        s = torch.where(usable, h_next / gamma, 0.0)
        Q[j], Q[j + 1] = c * Q[j] + s * Q[j + 1], c * Q[j + 1] - s * Q[j]
        R[:j, j] = torch.where(usable, column[:j], 0.0)
        R[j, j] = torch.where(usable, gamma, 1.0)
        g[j] = torch.where(usable, c * phi, 0.0)
        phi = torch.where(usable, -s * phi, phi)
        steps = steps + usable
        # h_next = 0: the Krylov space is exhausted and x is exact on it
        active = usable & ~(phi.abs() <= target) & (h_next > tiny * scale)
        V[j + 1] = torch.where(active, w / h_next, 0.0)
    y = torch.linalg.solve_triangular(R, g.unsqueeze(1), upper=True).squeeze(1)
    x = x + y.to(r.dtype) @ V[:size]
    return torch.where(broken, torch.nan, x), phi.abs(), steps
