"""What an estimator is: it turns the partial gradients of f into the hypergradient.

    ∇Φ(x) = ∂_x f + (∂y/∂x)ᵀ ∂_y f

    situation   everything an estimator may look at: problem, recorded window, rules, memory
    memory      what survives an outer step: the adjoint, a solver's eigenvalue
    estimate    the hypergradient and how it was found

An estimator is a frozen dataclass of parts with one method that reads like its theorem. It
never changes the parameters and never keeps state of its own.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import NoUpdateRule
from ..inner import (
    RULES,
    Loop,
    UpdateRule,
    Window,
    find_rule,
    missing_rule,
)
from ..problem import BilevelProblem, OuterGradients
from ..solvers import Memory, Solution


@dataclass
class EstimatorMemory:
    """What an estimator carries from one outer step to the next.

    Attributes:
        adjoint: v of the last outer step, flat; the warm start.
        solver: what the linear solver remembers.
    """

    adjoint: Tensor | None = None
    solver: Memory = field(default_factory=Memory)


@dataclass
class Situation:
    """What an estimator may look at.

    Attributes:
        problem: losses and variables at the user's live parameters.
        window: the recorded steps.
        optimizers: the inner optimizers, at their present state.
        loop: what the user declared about the inner loop.
        memory: what survives outer steps; read, not written.
    """

    problem: BilevelProblem
    window: Window
    optimizers: Sequence[torch.optim.Optimizer]
    loop: Loop
    memory: EstimatorMemory


@dataclass
class Estimate:
    """A hypergradient and how it was found.

    Attributes:
        gradient: ∇Φ, flat, of the outer layout.
        reached: per outer tensor, whether f or a recorded step depends on it.
        steps: inner steps it was taken through, or averaged over.
        hessian_steps: inner steps whose Hessian was used (implicit).
        solution: the linear solve (implicit).
        adjoint: v, flat, to start the next solve from.
        notes: approximations worth telling, one phrase each.
    """

    gradient: Tensor
    reached: list[bool]
    steps: int
    hessian_steps: int = 0
    solution: Solution | None = None
    adjoint: Tensor | None = None
    notes: list[str] = field(default_factory=list)


class Estimator(abc.ABC):
    """A way to compute the hypergradient; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    needs_outer_loss: ClassVar[bool] = True  # whether a task without one learns nothing
    follows: ClassVar[bool] = False  # whether `follow` is to be called after every step

    @abc.abstractmethod
    def new_window(self, max_bytes: int | None) -> Window:
        """An empty window that records what this estimator needs."""

    def check(  # noqa: B027  (most estimators accept every optimizer)
        self, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Refuse optimizers this estimator cannot work with.

        Raises:
            NoUpdateRule: it needs a rule that is not known.
        """

    def follow(self, situation: Situation) -> None:  # noqa: B027
        """Look at the inner step that has just been recorded, before an outer step is due.

        Only called if ``follows``; what is gathered lives in the window.

        Args:
            situation: problem, window, optimizers.
        """

    @abc.abstractmethod
    def estimate(self, situation: Situation, outer: OuterGradients) -> Estimate:
        """The hypergradient at the user's present parameters.

        Args:
            situation: problem, window, optimizers and memory.
            outer: value and partial gradients of the outer loss.

        Returns:
            The estimate; parameters and memory are unchanged.
        """


def rules_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[UpdateRule]:
    """The update rule of every inner optimizer.

    Raises:
        NoUpdateRule: one is not known.
    """
    found = []
    for optimizer in optimizers:
        rule = find_rule(optimizer, RULES)
        if rule is None:
            raise NoUpdateRule(missing_rule(optimizer, RULES))
        found.append(rule)
    return found
