"""The Neumann series with an independent sample of A in every product (stocBiO, MRBO, VRBO).

    v = η Σ_{q<K} w_q,    w_0 = b,    w_q = (I − η A_{ζ_q}) w_{q−1}

E v = η Σ_{q<K} (I − η E A)^q b, the truncated series of E A (Ji, Yang & Liang 2021). Every term
carries the factor η, the first included.
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
class StochasticNeumann(Solver):
    """The first ``num_steps`` terms of the Neumann series, a new sample for every product.

    Needs: every sample of A positive semi-definite with η A ≤ 2; theory asks η < 1/λ_max. Costs:
    ``num_steps − 1`` products (about ten more once, to estimate λ_max when ``step_size`` is left
    out), three vectors. The residual reported is ‖w_{K−1}‖/‖b‖: that of the sum without its last
    term if A had no noise.

    Args:
        num_steps: number of terms K (Q + 1 in the paper).
        step_size: η, in units of 1/curvature; None takes 1/λ̂_max by power iteration on a sample
            at first use, and again when divergence is seen.

    Example:
        >>> import torch
        >>> from torch_bilevel.solvers import Operator, StochasticNeumann
        >>> A = torch.diag(torch.tensor([1., 2.]))
        >>> solver = StochasticNeumann(num_steps=2, step_size=0.5)
        >>> solver.solve(Operator(A.mv, 2), torch.tensor([1., 1.])).value
        tensor([0.7500, 0.5000])
    """

    num_steps: int = 10
    step_size: float | None = None

    name: ClassVar[str] = "stochastic_neumann"
    uses_start: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.positive_int("StochasticNeumann", "num_steps", self.num_steps)
        _checks.real(
            "StochasticNeumann",
            "step_size",
            self.step_size,
            positive=True,
            optional=True,
        )

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`; ``x0`` is not used."""

        def run(eta: Tensor) -> Solution:
            w = total = b
            good = LastGood(b, total)
            for q in range(self.num_steps - 1):
                # w ← (I − η A_ζ) w
                before, Aw = w, operator.draw(q)(w)
                w = w - eta * Aw
                total = total + w
                good.note(total, w, before, Aw)
            diverged = good.grown(w)
            return solution(
                eta * good.unless(diverged, total),
                relative(w, b),
                num_steps=torch.tensor(self.num_steps, device=b.device),
                curvature=good.curvature,
                diverged=diverged,
            )

        return with_step_size(run, operator, b, self.step_size, memory, limit=1.0)
