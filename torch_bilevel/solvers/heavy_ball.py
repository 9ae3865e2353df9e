"""Heavy ball (Polyak 1964) for symmetric positive definite A with eigenvalues in [μ, L].

    x⁺ = x + λ (b − A x) + θ (x − x⁻),    λ = 4/(√L + √μ)²,    θ = ((√κ − 1)/(√κ + 1))²,    κ = L/μ

θ = max{(1 − √(λμ))², (1 − √(λL))²}, whose two terms are equal for this λ. In the end the error
falls by √θ a step, the bound of CG, with constant coefficients. The linear solver of AccBiO (Ji &
Liang 2023).

One thing differs: the first step is the best gradient step, λ/(1 + θ) = 2/(L + μ), instead of λ,
which is to start from x⁻ = x + 2/(L + μ) r (second-order Richardson, Golub & Varga 1961). Polyak's
x⁻ = x lets residuals grow at first, by up to √κ/e; from here none exceeds that of the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import _checks
from .base import Memory, Operator, Solution, Solver
from .momentum import check_bounds, descend, resolved, with_bounds


@dataclass(frozen=True)
class HeavyBall(Solver):
    """Polyak's heavy ball with a warm start: CG's rate with constant coefficients.

    Unlike CG's, its result is linear in b for a fixed number of steps.

    Needs: a symmetric positive definite A. Costs: one product a step (one more with a warm start;
    20 more, and 20 vectors, once where a bound is left out), six vectors. A host
    synchronisation a step unless ``rtol=0``.

    A ``lower`` that is off is only slower: twice with μ/4, three times with 4μ. The estimate is
    too large where κ ≳ 100; weight decay in the inner problem is a μ that you know. An ``upper``
    below λ_max − μ diverges, which is noticed and, where ``upper`` is estimated, repaired by a
    new estimate.

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
        >>> from torch_bilevel.solvers import HeavyBall, Operator
        >>> A = torch.diag(torch.tensor([1., 4.]))
        >>> solver = HeavyBall(max_steps=30, rtol=0., lower=1., upper=4.)
        >>> solver.solve(Operator(A.mv, 2), torch.tensor([1., 1.])).value
        tensor([1.0000, 0.2500])
    """

    max_steps: int = 20
    rtol: float = 1e-4
    lower: float | None = None
    upper: float | None = None

    name: ClassVar[str] = "heavy_ball"
    needs_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.positive_int("HeavyBall", "max_steps", self.max_steps)
        check_bounds("HeavyBall", self.lower, self.upper, self.rtol)

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`."""

        def run(mu: Tensor, L: Tensor, watch: bool) -> Solution:
            step = 4 / (L.sqrt() + mu.sqrt()) ** 2
            momentum = ((L.sqrt() - mu.sqrt()) / (L.sqrt() + mu.sqrt())) ** 2
            rule = (2 / (L + mu), step, momentum)
            return descend(
                operator, b, x0, rule, L, watch, self.max_steps, self.rtol, False
            )

        weakest = resolved(self.max_steps, self.rtol)
        return with_bounds(run, operator, b, self.lower, self.upper, weakest, memory)
