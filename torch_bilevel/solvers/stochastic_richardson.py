"""Stochastic fixed-point iteration with constant or decreasing steps (SID, BSGM).

    v_{k+1} = v_k + η_k (b − A_{ζ_k} v_k),    η_k = η γ/(γ + k)    (constant: η_k = η)

Grazzi, Pontil & Salzo (2021): a constant step decays linearly to a ball of noise; decreasing steps
give a mean squared error O(1/K). Their β/(γ + k) for the map I − ηA is this with β = γ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from .base import Memory, Operator, Solution, Solver, relative, solution
from .richardson import LastGood, with_step_size


@dataclass(frozen=True)
class StochasticRichardson(Solver):
    """Richardson iteration with a new sample of A in every step.

    Needs: E A with positive definite symmetric part. Costs: one product a step (about ten more
    once, to estimate λ_max when ``step_size`` is left out), two vectors. The residual reported is
    that of the last but one iterate on the sample of the last step, noise included.

    Args:
        num_steps: K.
        step_size: η, in units of 1/curvature; None takes 1/λ̂_max by power iteration on a sample
            at first use, and again when divergence is seen.
        decay: γ, in steps: after γ steps the step size is half of η. None keeps it constant.
            Theory asks γ ≥ 2/(1 − q²) ≈ κ for a contraction by q = 1 − η μ.

    Example:
        >>> import torch
        >>> from torch_bilevel.solvers import Operator, StochasticRichardson
        >>> A = torch.diag(torch.tensor([1., 2.]))
        >>> solver = StochasticRichardson(num_steps=60, step_size=0.6)
        >>> solver.solve(Operator(A.mv, 2), torch.tensor([1., 1.])).value
        tensor([1.0000, 0.5000])
    """

    num_steps: int = 20
    step_size: float | None = None
    decay: float | None = None

    name: ClassVar[str] = "stochastic_richardson"
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        owner = "StochasticRichardson"
        _checks.positive_int(owner, "num_steps", self.num_steps)
        for field in ("step_size", "decay"):
            value = getattr(self, field)
            _checks.real(owner, field, value, positive=True, optional=True)

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`; ``x0`` is used as it is, for noise hides which start is closer."""
        zero = torch.zeros_like(b)
        first = zero if x0 is None else torch.where(torch.dot(b, b) > 0, x0, zero)

        def run(eta: Tensor) -> Solution:
            v, r = first, b
            good = LastGood(b, eta * b)
            for k in range(self.num_steps):
                shrunk = 1.0 if self.decay is None else self.decay / (self.decay + k)
                Av = operator.draw(k)(v)
                r = b - Av
                good.note(v, r, v, Av)
                v = v + eta * shrunk * r
            # Noise makes residuals of the size of b; growth by 10 is not noise.
            diverged = good.grown(r, 100)
            return solution(
                good.unless(diverged, v),
                relative(r, b),
                num_steps=torch.tensor(self.num_steps, device=b.device),
                curvature=good.curvature,
                diverged=diverged,
            )

        return with_step_size(run, operator, b, self.step_size, memory, limit=1.0)
