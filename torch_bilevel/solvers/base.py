"""What a linear solver is: ``solve(A, b, x0) -> Solution``. It sees an operator, never a loss.

    operator   A, a map of flat vectors, with facts about it (size, symmetric)
    solver     a frozen dataclass whose fields are its hyperparameters
    solution   v with A v ≈ b, and how it was found
    memory     what a solver carries from one system to the next (an eigenvalue estimate)

Laws, asserted by tests: the residual it reports is ‖b − A v‖/‖b‖; a start x0 that solves the
system is returned unchanged; the start is never worse than zero; tolerances are relative to
‖b‖, because hypergradients near convergence have a tiny b and an absolute tolerance would
silently return zero. A product that is not finite gives a solution that is not finite: NaN is
never turned into a number.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._program import Program


@dataclass
class Operator:
    """A linear map of flat vectors, or the mean of random ones: A = E[A_ζ].

    Attributes:
        apply: the product v ↦ A v.
        size: the dimension.
        symmetric: whether A = Aᵀ.
        transpose: the product v ↦ Aᵀ v, for a map that is not symmetric.
        sample: makes A_ζ number k, independent of those of other numbers; None where A is exact.
        integer: a whole number below the one given, drawn so that it can be drawn again.
        program: gives A as a fixed program, where whole iterations may be captured.
        factors: (Z, D, λ) with A = Zᵀ D Z + diag(λ), given the most numbers Z may have.
    """

    apply: Callable[[Tensor], Tensor]
    size: int
    symmetric: bool = True
    transpose: Callable[[Tensor], Tensor] | None = None
    sample: Callable[[int], Operator] | None = None
    integer: Callable[[int], int] | None = None
    factors: Callable[[int], tuple[Tensor, Tensor, Tensor]] | None = None
    program: Callable[[], Program | None] | None = None
    num_products: int = 0

    def __call__(self, v: Tensor) -> Tensor:
        """A v."""
        self._count()
        return self.apply(v)

    def adjoint(self, v: Tensor) -> Tensor:
        """Aᵀ v."""
        self._count()
        if self.symmetric:
            return self.apply(v)
        assert self.transpose is not None
        return self.transpose(v)

    def _count(self) -> None:
        if not torch.compiler.is_compiling():  # a compiled loop has no side effects
            self.num_products += 1

    def draw(self, number: int) -> Operator:
        """The independent sample of A of that number; A itself where it is exact."""
        return self if self.sample is None else self.sample(number)


@dataclass
class Solution:
    """An approximate solution of A v = b. Flags and numbers are 0-d tensors on the device.

    Attributes:
        value: v, flat.
        num_steps: iterations that changed v.
        residual: ‖b − A v‖/‖b‖ (zero when b is zero).
        converged: the tolerance was met.
        negative_curvature: a direction p with pᵀA p < 0 was met; v is the last good iterate.
        curvature: pᵀA p / pᵀp there, or of the last direction.
        diverged: the iteration moved away from the solution.
        safe_step: the step size that would converge, where the solver has one.
        risky_step: the step size given is larger than the method's theory allows.
    """

    value: Tensor
    num_steps: Tensor
    residual: Tensor
    converged: Tensor
    negative_curvature: Tensor
    curvature: Tensor
    diverged: Tensor
    safe_step: Tensor | None = None
    risky_step: bool = False

    @property
    def status(self) -> str:
        """One word; reading it synchronises with the device."""
        if bool(self.diverged):
            return "diverged"
        if bool(self.negative_curvature):
            return "negative curvature"
        return "converged" if bool(self.converged) else "max steps"


@dataclass
class Memory:
    """What a solver remembers between systems.

    Attributes:
        eigenvalue: λ̂_max of A.
        eigenvector: the vector that gave it; with both ends estimated, the sum of both.
        smallest: the smallest λ̂ of A, where both ends were estimated.
    """

    eigenvalue: Tensor | None = None
    eigenvector: Tensor | None = None
    smallest: Tensor | None = None


class Solver(abc.ABC):
    """A way to solve A v = b; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    needs_symmetric: ClassVar[bool] = False
    uses_start: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False  # made for a new sample of A in every product
    pure: ClassVar[bool] = True  # a function of A and b alone, in tensors
    batched: ClassVar[bool] = False  # takes many systems, along leading dimensions
    solves: ClassVar[bool] = True  # tends to the solution as it takes more steps

    @abc.abstractmethod
    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """Solve A v = b.

        Args:
            operator: A.
            b: right-hand side, shape ``(operator.size,)``.
            x0: start; ignored when zero is closer.
            memory: carries an eigenvalue estimate between systems.

        Returns:
            The solution with its status and relative residual.
        """


def start(operator: Operator, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x, r = b − A x) from x0, or from zero if that is closer."""
    if x0 is None:
        return torch.zeros_like(b), b.clone()
    r = b - operator(x0)
    worse = ~(torch.dot(r, r) < torch.dot(b, b))  # also when r is not finite
    zero = b.new_zeros(())
    return torch.where(worse, zero, x0), torch.where(worse, b, r)


def relative(r: Tensor, b: Tensor) -> Tensor:
    """‖r‖/‖b‖, zero when both are zero."""
    size = torch.linalg.vector_norm(b)
    norm = torch.linalg.vector_norm(r)
    return torch.where(norm == 0, torch.zeros_like(norm), norm / size)


def solution(value: Tensor, residual: Tensor, **given: Any) -> Solution:
    """A `Solution` in which what is not given is false or zero."""
    no = torch.zeros((), dtype=torch.bool, device=value.device)
    defaults: dict[str, Any] = {
        "num_steps": torch.zeros((), dtype=torch.int64, device=value.device),
        "converged": no,
        "negative_curvature": no,
        "curvature": value.new_zeros(()),
        "diverged": no,
    }
    return Solution(value=value, residual=residual, **{**defaults, **given})
