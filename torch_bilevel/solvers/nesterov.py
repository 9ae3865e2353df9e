"""Nesterov's accelerated gradient for symmetric positive definite A with eigenvalues in [μ, L].

    y = x + β (x − x⁻),    x⁺ = y + (b − A y)/L,    β = (√κ − 1)/(√κ + 1),    κ = L/μ

Constant momentum (Nesterov 2004, scheme 2.2.22) on ½vᵀAv − bᵀv. In the end the error falls by
1 − 1/√κ a step: half as fast as heavy ball, but it still converges with L = ¾ λ_max. The linear
solver of BiO-AIMA (Chen, Kailkhura & Zhou), which calls it implicit momentum acceleration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import _checks
from .base import Memory, Operator, Solution, Solver
from .momentum import check_bounds, descend, resolved, with_bounds


@dataclass(frozen=True)
class Nesterov(Solver):
    """Nesterov's accelerated gradient descent, with a warm start.

    Its result is linear in b for a fixed number of steps.

    Needs: a symmetric positive definite A. Costs: one product a step (one more with a warm start;
    20 more, and 20 vectors, once where a bound is left out), six vectors. A host
    synchronisation a step unless ``rtol=0``.

    A ``lower`` that is off is only slower: twice with μ/4, three times with 4μ. The estimate is
    too large where κ ≳ 100; weight decay in the inner problem is a μ that you know. An ``upper``
    below ¾ λ_max diverges, which is noticed and, where ``upper`` is estimated, repaired by a new
    estimate.

    Args:
        max_steps: cap on the number of steps.
        rtol: stop when ‖b − A v‖ ≤ rtol·‖b‖; 0 runs all steps.
        lower: μ, in units of curvature; None takes the smallest Ritz value of 20 Lanczos
            steps at first use (and a μ that ``max_steps`` can resolve where A is singular).
        upper: L, in units of curvature; None takes 1.05 times the largest, and again when the
            residual grows or a product shows λ_max > L.

    Raises:
        ValueError: ``lower`` exceeds ``upper``, or a number is out of range.

    Example:
        >>> import torch
        >>> from torch_bilevel.solvers import Nesterov, Operator
        >>> A = torch.diag(torch.tensor([1., 4.]))
        >>> solver = Nesterov(max_steps=40, rtol=0., lower=1., upper=4.)
        >>> solver.solve(Operator(A.mv, 2), torch.tensor([1., 1.])).value
        tensor([1.0000, 0.2500])
    """

    max_steps: int = 20
    rtol: float = 1e-4
    lower: float | None = None
    upper: float | None = None

    name: ClassVar[str] = "nesterov"
    needs_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.positive_int("Nesterov", "max_steps", self.max_steps)
        check_bounds("Nesterov", self.lower, self.upper, self.rtol)

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`."""

        def run(mu: Tensor, L: Tensor, watch: bool) -> Solution:
            momentum = (L.sqrt() - mu.sqrt()) / (L.sqrt() + mu.sqrt())
            rule = (1 / L, 1 / L, momentum)
            return descend(
                operator, b, x0, rule, L, watch, self.max_steps, self.rtol, True
            )

        weakest = resolved(self.max_steps, self.rtol)
        return with_bounds(run, operator, b, self.lower, self.upper, weakest, memory)
