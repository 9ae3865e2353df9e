"""Equations F(y; θ) = 0 whose solution is a function of θ, differentiable by the implicit theorem.

    ∂y/∂θ = −A⁻¹ ∂_θ F,    A = ∂_y F
    backward   θ̄ = −(∂_θ F)ᵀ u,    Aᵀ u = ȳ            forward   ẏ = −A⁻¹ ∂_θ F θ̇

u solves an equation of the same kind, linear, with θ = (ȳ, y, θ). So its derivative is known too,
and derivatives of any order follow from one `torch.autograd.Function`, which carries the derivative
and lets ``vmap`` batch what it computes. How a solution was found plays no part in its derivative.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsolvedWarning
from ..solvers import Operator, Solution, Solver, may_look, transformed
from .levels import check_operands
from .matrices import Below, Jacobian, Matrix, lanes_at, with_lanes
from .trees import pull, push


class Equation(abc.ABC):
    """F(y; θ) = 0 in flat vectors y; θ is a list of tensors."""

    owner: str  # who solves it, in messages

    @abc.abstractmethod
    def solve(self, *theta: Tensor) -> tuple[Tensor, ...]:
        """The solution, and whatever else there is to tell, without derivative."""

    @abc.abstractmethod
    def residual(self, y: Tensor, *theta: Tensor) -> Tensor:
        """F(y; θ), differentiable."""

    @abc.abstractmethod
    def transposed(self) -> System:
        """Aᵀ and how to solve with it; what it depends on is (y, *θ)."""

    @abc.abstractmethod
    def tangent(self) -> System:
        """A and how to solve with it; what it depends on is (y, *θ)."""

    def pull(
        self, y: Tensor, theta: Sequence[Tensor], u: Tensor
    ) -> list[Tensor | None]:
        """(∂_θ F)ᵀ u."""
        return pull(lambda *theta: self.residual(y, *theta), theta, u)

    def push(
        self, y: Tensor, theta: Sequence[Tensor], dots: Sequence[Tensor | None]
    ) -> Tensor | None:
        """∂_θ F θ̇; None where nothing has a tangent."""
        return push(lambda *theta: self.residual(y, *theta), theta, dots)


@dataclass(frozen=True)
class System(Equation):
    """The linear equation A v = b or Aᵀ v = b, with θ = (b, v₀, what A depends on), v₀ a start.

    Attributes:
        matrix: A.
        solver: a linear solver.
        owner: who solves, in messages.
        transpose: whether the equation is with Aᵀ.
        skip: how many tensors of θ stand between v₀ and what A depends on.
        reported: whether the caller says how the solve ended; otherwise a warning does.
    """

    matrix: Matrix
    solver: Solver
    owner: str
    transpose: bool = False
    skip: int = 0
    reported: bool = False

    def solve(self, *theta: Tensor) -> tuple[Tensor, ...]:
        """v, and the numbers of the `Solution`."""
        b, start, *rest = theta
        rest = rest[self.skip :]
        if transformed() and not torch.compiler.is_compiling():
            matrix = self.matrix
            if self.solver.batched and isinstance(matrix, Jacobian):
                if matrix.trusted(*rest):
                    return _Lanes.apply(self, b, start, *rest)  # type: ignore[return-value]
            b = with_lanes(b, rest)
        return self.solve_here(b, start, *rest)

    def solve_here(self, b: Tensor, start: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """The same at the present level, of what A depends on alone."""
        products = self.matrix.linearised(*rest)
        product, other = products[::-1] if self.transpose else products
        operator = Operator(product, b.shape[-1], self.matrix.symmetric, other)
        x0 = start if self.solver.uses_start and start.numel() else None
        found = self.solver.solve(operator, b, x0)
        if not self.reported and may_look() and not bool(found.converged.all()):
            tolerance = max(10 * (getattr(self.solver, "rtol", 0) or 1e-5), 1e-12)
            least = 100 * torch.finfo(b.dtype).eps  # what the precision can reach
            residual = float(found.residual.max())
            if not residual <= max(tolerance, least):
                self._warn(residual, int(found.num_steps.max()))
        return found.value, numbers(found)

    def _warn(self, residual: float, steps: int) -> None:
        """Say that a derivative is less exact than it looks."""
        warnings.warn(
            f"{self.owner}: the linear system of a derivative was left with a relative residual "
            f"of about {residual:.0e} after {steps} steps of {self.solver}; the derivative is as "
            "far off. Give the solver more steps, another solver (solver='direct' is exact), or a "
            "tolerance that the precision can reach.",
            UnsolvedWarning,
            stacklevel=2,
        )

    def residual(self, y: Tensor, *theta: Tensor) -> Tensor:
        """A v − b."""
        b, _, *rest = theta
        apply = self.matrix.transposed if self.transpose else self.matrix.product
        return apply(y, *rest[self.skip :]) - b

    def tangent(self) -> System:
        """The same matrix; (v, b, v₀) stand before what it depends on."""
        return replace(self, skip=self.skip + 3, reported=False)

    def transposed(self) -> System:
        """Its transpose."""
        flipped = not self.transpose and not self.matrix.symmetric
        return replace(self.tangent(), transpose=flipped)


class Numbers(NamedTuple):
    """How a linear solve ended; see `solvers.Solution`."""

    residual: Tensor
    num_steps: Tensor
    converged: Tensor
    negative_curvature: Tensor
    curvature: Tensor
    diverged: Tensor


def numbers(found: Solution) -> Tensor:
    """`Numbers` as one tensor: forward mode wants floating-point outputs only."""
    each = (getattr(found, name) for name in Numbers._fields)
    return torch.stack([number.to(found.residual.dtype) for number in each], -1)


def told(numbers: Tensor) -> Numbers:
    """The inverse of `numbers`."""
    residual, steps, converged, negative, curvature, diverged = numbers.detach().unbind(
        -1
    )
    return Numbers(
        residual, steps.long(), converged > 0, negative > 0, curvature, diverged > 0
    )


class _Lanes(Below):
    """The solution of a system by a solver that takes many at once, below the transforms."""

    @staticmethod
    def forward(system: System, b: Tensor, start: Tensor, *rest: Tensor) -> Any:  # type: ignore[override]
        return system.solve_here(b, start, *rest)

    @staticmethod
    def vmap(info: Any, in_dims: Any, system: System, *tensors: Tensor) -> Any:  # type: ignore[override]
        """All lanes at once."""
        assert isinstance(system.matrix, Jacobian)
        first, dims = tensors[:3], in_dims[1:]  # b, v₀ and y have one each
        pairs = zip(first, dims, strict=False)
        b, start, y = (lanes_at(t, dim, 0, info.batch_size) for t, dim in pairs)
        matrix = system.matrix.of_lanes(dims[3:], info.randomness)
        every = replace(system, matrix=matrix, skip=0)
        return _Lanes.apply(every, b, start, y, *tensors[3:]), (0, 0)


def solved(
    system: System, b: Tensor, start: Tensor | None, rest: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The solution of a linear system and its numbers, differentiable in b and the rest."""
    start = b.new_zeros(0) if start is None else start
    return implicit(system, b, start, *rest)


def implicit(equation: Equation, *theta: Tensor) -> tuple[Tensor, ...]:
    """What `Equation.solve` gives, its first tensor differentiable in θ unless it is compiled.

    Raises:
        ForwardOverForward: two nested forward-mode transforms differentiate it.
    """
    if torch.compiler.is_compiling():  # custom functions are not part of a program
        return equation.solve(*theta)
    check_operands(theta, equation.owner)
    return _Implicit.apply(equation, *theta)  # type: ignore[return-value]


class _Implicit(torch.autograd.Function):
    """The solution of an equation as a function of θ; see the module's formulas."""

    generate_vmap_rule = True

    @staticmethod
    def forward(equation: Equation, *theta: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return equation.solve(*theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        equation, *theta = inputs
        ctx.equation = equation
        ctx.save_for_backward(output[0], *theta)
        ctx.save_for_forward(output[0], *theta)
        ctx.others = output[1:]

    @staticmethod
    def backward(ctx: Any, bar: Tensor, *others: Any) -> Any:  # type: ignore[override]
        y, *theta = ctx.saved_tensors
        equation = ctx.equation
        u, *_ = solved(equation.transposed(), bar, None, (y, *theta))
        return None, *equation.pull(y, theta, -u)

    @staticmethod
    def jvp(ctx: Any, _: Any, *dots: Tensor | None) -> Any:  # type: ignore[override]
        y, *theta = ctx.saved_tensors
        equation = ctx.equation
        b = equation.push(y, theta, dots)
        if b is None:
            dot = torch.zeros_like(y)
        else:
            dot, *_ = solved(equation.tangent(), -b, None, (y, *theta))
        return dot, *(torch.zeros_like(other) for other in ctx.others)
