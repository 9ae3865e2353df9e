"""One random term of the Neumann series, scaled to have the mean of the sum (BSA, TTSA, SUSTAIN).

    v = η K Π_{q ≤ ℓ} (I − η A_{ζ_q}) b,    ℓ uniform on {0, …, K − 1}

E v = η Σ_{q<K} (I − η E A)^q b exactly (Ghadimi & Wang 2018), with half the products of the sum on
average and a variance that grows with K.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from .base import Memory, Operator, Solution, Solver, relative, solution
from .richardson import LastGood, with_step_size


@dataclass(frozen=True)
class RandomTruncatedNeumann(Solver):
    """A random term of the Neumann series, unbiased for the sum of its first ``num_steps``.

    Needs: as `StochasticNeumann`. Costs: (``num_steps`` − 1)/2 products on average (about ten more
    once, to estimate λ_max when ``step_size`` is left out), two vectors. The residual reported is
    ‖(I − η A)^ℓ b‖/‖b‖.

    Args:
        num_steps: number of terms K of the sum it stands for.
        step_size: η, as in `StochasticNeumann`.

    Example:
        >>> import torch
        >>> from torch_bilevel.solvers import Operator, RandomTruncatedNeumann
        >>> A = torch.diag(torch.tensor([1., 2.]))
        >>> solver = RandomTruncatedNeumann(num_steps=1, step_size=0.5)
        >>> solver.solve(Operator(A.mv, 2), torch.tensor([1., 1.])).value
        tensor([0.5000, 0.5000])
    """

    num_steps: int = 10
    step_size: float | None = None

    name: ClassVar[str] = "random_truncated_neumann"
    uses_start: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True
    pure: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.positive_int("RandomTruncatedNeumann", "num_steps", self.num_steps)
        _checks.real(
            "RandomTruncatedNeumann",
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
        draw = operator.integer or random.randrange
        length = draw(self.num_steps)

        def run(eta: Tensor) -> Solution:
            w = b
            good = LastGood(b, w)
            for q in range(length):
                # w ← (I − η A_ζ) w
                before, Aw = w, operator.draw(q)(w)
                w = w - eta * Aw
                good.note(w, w, before, Aw)
            diverged = good.grown(w)
            return solution(
                eta * self.num_steps * good.unless(diverged, w),
                relative(w, b),
                num_steps=torch.tensor(length, device=b.device),
                curvature=good.curvature,
                diverged=diverged,
            )

        return with_step_size(run, operator, b, self.step_size, memory, limit=1.0)
