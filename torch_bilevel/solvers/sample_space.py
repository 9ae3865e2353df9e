"""A direct solve in the space of the model's outputs, where they are fewer than parameters.

For A = Λ + Zᵀ D Z with Λ diagonal, D of the size of the outputs (Woodbury's identity),

    A⁻¹ b = Λ⁻¹ (b − Zᵀ (I + D K)⁻¹ D Z Λ⁻¹ b),      K = Z Λ⁻¹ Zᵀ

D need not be invertible. For a linear head of a few examples it is exact and without iteration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from ..errors import SolverLimit
from .base import Memory, Operator, Solution, Solver, relative, solution


@dataclass(frozen=True)
class SampleSpace(Solver):
    """Solve by an m × m system, m the number of the model's outputs over the batch.

    Needs: factors of A, which ``products="gauss_newton"`` has; a positive Λ (weight decay, a
    penalty or ``damping=``). Exact for the Gauss–Newton matrix, hence for H of models that are
    linear in their parameters. Costs: m backward passes at once, m·n numbers, O(m² n + m³) time.

    Args:
        max_bytes: refuse to build matrices larger than this.

    Example:
        >>> import torch
        >>> from torch_bilevel.solvers import Operator, SampleSpace
        >>> Z, D, diagonal = torch.ones(1, 3), torch.eye(1), torch.ones(3)
        >>> A = torch.eye(3) + Z.T @ D @ Z
        >>> operator = Operator(A.mv, 3, factors=lambda limit: (Z, D, diagonal))
        >>> SampleSpace().solve(operator, torch.tensor([4., 4., 4.])).value
        tensor([1., 1., 1.])
    """

    max_bytes: int = 2**30

    name: ClassVar[str] = "sample_space"
    needs_symmetric: ClassVar[bool] = True
    uses_start: ClassVar[bool] = False
    pure: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.positive_int("SampleSpace", "max_bytes", self.max_bytes)

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`; ``x0`` is not used.

        Raises:
            SolverLimit: A has no factors, Λ is not positive, or they do not fit.
        """
        if operator.factors is None:
            raise SolverLimit(
                "'sample_space' needs factors of the system. Give the optimizer "
                "products='gauss_newton', or use 'cg' or 'direct'."
            )
        Z, D, diagonal = operator.factors(self.max_bytes // b.element_size())
        if not bool((diagonal > 0).all()):
            raise SolverLimit(
                f"'sample_space' needs a positive diagonal beside the model's outputs, and its "
                f"smallest entry is {float(diagonal.min()):.3g}. Add weight decay in the inner "
                "optimizer or damping=, or use 'cg'."
            )
        # v = Λ⁻¹ (b − Zᵀ w),  (I + D K) w = D Z Λ⁻¹ b
        ZL = Z / diagonal
        identity = torch.eye(len(D), dtype=D.dtype, device=D.device)
        w = torch.linalg.solve(identity + D @ (ZL @ Z.mT), D @ (ZL @ b))
        value = (b - Z.mT @ w) / diagonal
        residual = relative(b - operator(value), b)
        return solution(
            value,
            residual,
            num_steps=torch.tensor(1, device=b.device),
            converged=residual <= torch.finfo(b.dtype).eps ** 0.5,
            diverged=residual > 1,  # the precision does not carry so small a diagonal
        )
