"""Forward mode (Franceschi et al. 2017): tangents of the iterates, alongside the loop.

    ∇Φ_K = ∂_x f + Zᵀ ∂_y f,    Z_{k+1} = ∂Φ/∂y Z_k + ∂Φ/∂G (H Z_k + Jᵀ),    Z_0 = 0

The same gradient as `Unrolled`, without storing the loop; cost and memory grow with the number of
outer variables instead of the number of steps. With ``carry=True`` Z lives on after an outer
step, although x has moved: real-time hyperparameter optimisation (RTHO).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from .._registry import changed, describe
from ..errors import NoInnerStep, SolverLimit
from ..inner import Tangents, Window, check_mismatch, refuse_unregistered
from ..problem import (
    BilevelProblem,
    OuterGradients,
    raise_if_no_second_derivative,
)
from .base import Estimate, Estimator, Situation, Wording, rules_of


class Following(abc.ABC):
    """What estimators share that carry tangents along with the loop."""

    follows: ClassVar[bool] = True
    frozen_constant: ClassVar[bool] = False
    name: ClassVar[str]

    def __str__(self) -> str:
        return describe(self.name, changed(self))

    def wording(self, fresh: bool) -> Wording:
        """See `Estimator.wording`."""
        return Wording(
            adjoint="none; tangents of the inner parameters are carried along",
            batches="every inner step's own, as it is taken",
            problem="replayed",
        )

    def check(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Refuse optimizers without an update rule."""
        rules_of(optimizers)

    @abc.abstractmethod
    def basis(self, problem: BilevelProblem, number: int) -> Tensor:
        """The directions of a window: (count, outer numel).

        Args:
            problem: for the layout.
            number: how many windows there were before.
        """

    def assemble(self, basis: Tensor, along: Tensor) -> Tensor:
        """The indirect part of the hypergradient from ⟨z_i, ∂_y f⟩ along each direction."""
        return along @ basis

    def follow(self, situation: Situation) -> None:
        """Carry the tangents through the step just recorded; see `Estimator.follow`."""
        window, problem = situation.window, situation.problem
        if window.tangents is None:
            window.tangents = Tangents(problem, self.basis(problem, window.number))
        rules, record = rules_of(situation.optimizers), window.records[-1]
        refuse_unregistered(record)
        try:
            window.tangents.advance(problem, record, rules, situation.loop)
        except RuntimeError as error:
            raise_if_no_second_derivative(error)
            raise

    def estimate(self, situation: Situation, outer: OuterGradients) -> Estimate:
        """∇Φ = ∂_x f + Σ_i ⟨z_i, ∂_y f⟩ e_i; see `Estimator.estimate`."""
        tangents, count = situation.window.tangents, situation.window.count
        if tangents is None or tangents.steps < count:
            followed = 0 if tangents is None else tangents.steps
            raise NoInnerStep(
                f"{self} has carried tangents through {followed} of the {count} inner steps since "
                "the last outer step; the others were recorded for another estimator. Set "
                f"optimizer.estimator = {str(self)!r} before the steps it is to differentiate, "
                "best right after an outer step."
            )
        problem, (*_, last) = situation.problem, situation.window
        values = [tensor.detach() for tensor in problem.inner.tensors]
        check_mismatch(*tangents.errors(problem, last.calls, values))
        along = tangents.values @ outer.inner
        indirect = self.assemble(tangents.directions, along.to(outer.outer))
        return Estimate(
            gradient=outer.outer + indirect,
            reached=[
                a or b for a, b in zip(outer.reached, tangents.reached, strict=True)
            ],
            steps=tangents.steps,
        )


@dataclass(frozen=True)
class Forward(Following, Estimator):
    """Forward mode: exact, for few outer variables and any number of steps.

    Needs: an update rule for the inner optimizer. Costs: for each inner step one more gradient
    and, for each number in the outer variables, one product; memory is a tangent of parameters
    and optimizer state for each. It equals `Unrolled` to rounding, and keeps no steps, so
    `check_hypergradient` cannot run them again: check `Unrolled` on the same loop.

    Args:
        carry: keep the tangents when an outer step is taken (RTHO).
        max_outer: refuse more outer numbers than this.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.Forward(carry=True))
        'forward(carry=True)'
    """

    carry: bool = False
    max_outer: int = 256

    name: ClassVar[str] = "forward"

    def __post_init__(self) -> None:
        _checks.positive_int("Forward", "max_outer", self.max_outer)

    def new_window(self, max_bytes: int | None) -> Window:
        """A window of the last step only."""
        return Window(last=1, iterates=True, carry=self.carry, max_bytes=max_bytes)

    def basis(self, problem: BilevelProblem, number: int) -> Tensor:
        """The unit vectors; see `Following.basis`.

        Raises:
            SolverLimit: there are more than ``max_outer``.
        """
        inner, outer = problem.inner.layout, problem.outer.layout
        if outer.numel > self.max_outer:
            size = outer.numel * inner.numel * 4 / 2**20
            raise SolverLimit(
                f"Forward mode follows a tangent of the {inner.numel:,} inner numbers for each of "
                f"the {outer.numel:,} outer ones: {outer.numel:,} products for every inner step, "
                f"and {size:,.1f} MiB or more. Use 'unrolled', 'forward_gradient(directions=8)' "
                f"or an implicit estimator, or raise max_outer (it is {self.max_outer})."
            )
        return torch.eye(outer.numel, dtype=outer.dtype, device=outer.device)
