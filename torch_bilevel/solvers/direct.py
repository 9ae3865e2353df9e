"""A dense solve: A is built column by column and inverted. For small problems and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from ..errors import SolverLimit
from .base import Memory, Operator, Solution, Solver, relative, solution
from .loops import may_look


@dataclass(frozen=True)
class Direct(Solver):
    """Build A with one product per parameter and solve exactly.

    A singular system gets its least-squares solution of least norm, with eigenvalues smaller
    than n·eps times the largest counted as zero.

    Needs: few inner parameters. Costs: n products, n² numbers, O(n³) time.

    Args:
        max_bytes: refuse to build a matrix larger than this.

    Example:
        >>> import torch
        >>> from torch_bilevel.solvers import Direct, Operator
        >>> A = torch.tensor([[2., 1.], [1., 3.]])
        >>> Direct().solve(Operator(A.mv, 2), torch.tensor([3., 4.])).value
        tensor([1.0000, 1.0000])
    """

    max_bytes: int = 2**30

    name: ClassVar[str] = "direct"
    uses_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.positive_int("Direct", "max_bytes", self.max_bytes)

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`; ``x0`` is not used.

        Raises:
            SolverLimit: the matrix would not fit in ``max_bytes``.
        """
        size = operator.size**2 * b.element_size()
        if size > self.max_bytes:
            raise SolverLimit(
                f"Direct() would build a {operator.size} × {operator.size} matrix "
                f"({size / 2**20:,.0f} MiB, limit {self.max_bytes / 2**20:,.0f} MiB). Use 'cg' "
                "or 'minres', or raise max_bytes."
            )
        matrix = _matrix(operator, b)
        cutoff = operator.size * torch.finfo(b.dtype).eps
        finite = torch.isfinite(matrix).all()
        if may_look() and not bool(finite):
            value, residual = torch.full_like(b, torch.nan), b.new_tensor(torch.nan)
            return solution(value, residual)
        matrix = torch.where(finite, matrix, 0.0)  # LAPACK does not accept it
        if operator.symmetric:
            # A = Q Λ Qᵀ;  v = Q Λ⁺ Qᵀ b
            eigenvalues, Q = torch.linalg.eigh((matrix + matrix.T) / 2)
            zero = eigenvalues.abs() <= cutoff * eigenvalues.abs().amax()
            inverse = torch.where(zero, torch.zeros_like(eigenvalues), 1 / eigenvalues)
            value = Q @ (inverse * (Q.T @ b))
        else:
            value = torch.linalg.pinv(matrix, rtol=cutoff) @ b
        value = torch.where(finite, value, torch.nan)
        residual = relative(b - matrix @ value, b)
        return solution(
            value,
            residual,
            num_steps=torch.ones_like(finite, dtype=torch.int64),
            converged=residual <= cutoff**0.5,
        )


def _matrix(operator: Operator, b: Tensor) -> Tensor:
    """A by its columns; at once where its products are pure functions."""
    size = operator.size
    basis = torch.eye(size, dtype=b.dtype, device=b.device)
    if not may_look():  # products of pure functions
        return torch.func.vmap(operator.apply)(basis).mT
    return torch.stack([operator(row.clone()) for row in basis.unbind()], dim=1)
