"""What every engine gives at a point: the inner gradient and products with H and J."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._program import Program
from ..errors import SolverLimit, StalePoint

if TYPE_CHECKING:
    from .problem import BilevelProblem


NOTHING = torch.empty(0)  # what was not asked for


class Point(abc.ABC):
    """Products with H and J at the point where it was made.

    Laws, asserted by tests: `joint` is (`hvp`, `cross`); ⟨u, H v⟩ = ⟨v, H u⟩ where ``symmetric``;
    ⟨J v, u⟩ = ⟨v, Jᵀ u⟩; randomness (dropout) is the same in every product; used after the
    parameters moved it raises.

    Args:
        problem: the problem, for layouts and the point.
        symmetric: H is that of a loss; for the residual of a map, H stands for (∂_y G)ᵀ and J
            for (∂_x G)ᵀ.

    Attributes:
        reached: per outer tensor, whether a product with J has reached it.
    """

    def __init__(self, problem: BilevelProblem, symmetric: bool = True):
        self.problem = problem
        self.symmetric = symmetric
        self.reached = [False] * len(problem.outer.tensors)
        self._token = self._now()

    @property
    @abc.abstractmethod
    def gradient(self) -> Tensor:
        """∇_y g as a flat vector, detached."""

    @abc.abstractmethod
    def product(self, v: Tensor, inner: bool, outer: bool) -> tuple[Tensor, Tensor]:
        """H v if ``inner`` and J v if ``outer``, flat; empty where not asked for."""

    @abc.abstractmethod
    def transpose(self, u: Tensor) -> Tensor:
        """Hᵀ u, flat, of the inner layout."""

    @abc.abstractmethod
    def cross_transpose(self, u: Tensor) -> Tensor:
        """Jᵀ u for u of the outer layout, flat, of the inner layout."""

    def program(self) -> Program | None:
        """The map v ↦ H v as a fixed program of this point's values, for engines that have one."""
        return None

    def factors(self, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """(Z, D, λ) with H = Zᵀ D Z + diag(λ), for engines that know the model's outputs.

        Args:
            limit: the most numbers Z may have.

        Raises:
            SolverLimit: this engine does not.
        """
        raise SolverLimit(
            "A solve in the space of the outputs needs to know them: give the optimizer "
            "products='gauss_newton', or use 'cg' or 'direct'."
        )

    def reach(self, parts: Sequence[Tensor | None]) -> None:
        """Note which outer tensors a product with J reached; None where it did not."""
        self.reached = [
            known or part is not None
            for known, part in zip(self.reached, parts, strict=True)
        ]

    def flat(
        self,
        to_inner: Sequence[Tensor | None],
        to_outer: Sequence[Tensor | None],
        inner: bool,
        outer: bool,
    ) -> tuple[Tensor, Tensor]:
        """What `product` gives, from parts."""
        problem = self.problem
        return (
            problem.inner.layout.flatten(to_inner) if inner else NOTHING,
            problem.outer.layout.flatten(to_outer) if outer else NOTHING,
        )

    def hvp(self, v: Tensor) -> Tensor:
        """H v, flat, of the inner layout."""
        self.begin()
        return self.product(v, inner=True, outer=False)[0]

    def cross(self, v: Tensor) -> Tensor:
        """J v = ∂_x⟨∇_y g, v⟩, flat, of the outer layout."""
        self.begin()
        return self.product(v, inner=False, outer=True)[1]

    def joint(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """(H v, J v), flat."""
        self.begin()
        return self.product(v, inner=True, outer=True)

    def begin(self) -> None:
        """Count a product and refuse it at another point.

        Raises:
            StalePoint: the parameters moved.
        """
        self.problem.num_products += 1
        self.check()

    def check(self) -> None:
        """Refuse another point.

        Raises:
            StalePoint: the parameters moved.
        """
        if self._now() != self._token:
            raise StalePoint(
                "This linearisation belongs to another point: the inner or outer parameters "
                "moved since problem.linearize(...). Linearise again at the present point."
            )

    def _now(self) -> tuple:
        return self.problem.inner.token(), self.problem.outer.token()
