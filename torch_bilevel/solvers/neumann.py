"""The truncated Neumann series for positive definite A.

    v_K = η Σ_{q<K} (I − η A)^q b  =  A⁻¹ (I − (I − η A)^K) b

K terms cost K − 1 products and equal K Richardson steps from zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from .base import Memory, Operator, Solution, Solver
from .richardson import iterate, with_step_size


@dataclass(frozen=True)
class Neumann(Solver):
    """The first ``num_steps`` terms of the Neumann series.

    Needs: the symmetric part of A positive definite. Costs: ``num_steps − 1`` products (about
    ten more once, to estimate λ_max when ``step_size`` is left out), three vectors. No warm
    start: the result is that of a fixed number of terms from zero. The residual reported is that of
    the sum without its last term.

    Args:
        num_steps: number of terms K.
        step_size: η, in units of 1/curvature; None takes 1/λ̂_max by power iteration at first
            use, and again when divergence is seen.

    Example:
        >>> import torch
        >>> from torch_bilevel.solvers import Neumann, Operator
        >>> A = torch.diag(torch.tensor([1., 2.]))
        >>> solver = Neumann(num_steps=2, step_size=0.5)
        >>> solver.solve(Operator(A.mv, 2), torch.tensor([1., 1.])).value
        tensor([0.7500, 0.5000])
    """

    num_steps: int = 20
    step_size: float | None = None

    name: ClassVar[str] = "neumann"
    uses_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.positive_int("Neumann", "num_steps", self.num_steps)
        _checks.real(
            "Neumann", "step_size", self.step_size, positive=True, optional=True
        )

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`; ``x0`` is not used."""
        zero = torch.zeros_like(b)

        def run(eta: Tensor) -> Solution:
            return iterate(
                operator, b, zero, b, eta, self.num_steps, 0.0, last_product=False
            )

        return with_step_size(run, operator, b, self.step_size, memory)
