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
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import NoUpdateRule
from ..inner import (
    RULES,
    Loop,
    StepRecord,
    UpdateRule,
    Window,
    find_rule,
    missing_rule,
)
from ..problem import BilevelProblem, Call, OuterGradients, Ticket, WeightedCall
from ..products import DoubleBackward, Products
from ..solvers import Memory, Solution


@dataclass
class EstimatorMemory:
    """What an estimator carries from one outer step to the next.

    Attributes:
        adjoint: v of the last outer step, flat; the warm start.
        solver: what the linear solver remembers.
        directions: per variable, what its `DirectionMemory` remembers.
    """

    adjoint: Tensor | None = None
    solver: Memory = field(default_factory=Memory)
    directions: dict[str, dict[str, Any]] = field(default_factory=dict)

    def copy(self) -> EstimatorMemory:
        """For one estimate: what the solver learns there is kept with it, or not at all."""
        return replace(self, solver=replace(self.solver))

    def keep(self, found: Estimate) -> None:
        """What an estimate is to leave behind, once its outer step is taken."""
        self.directions.update(found.directions)
        if found.adjoint is not None:
            self.adjoint = found.adjoint
        if found.solver is not None:
            self.solver = found.solver

    def start(self, like: Tensor, warm: bool = True) -> Tensor | None:
        """The last adjoint, if it fits ``like`` and a warm start is wanted."""
        v = self.adjoint
        return v if warm and v is not None and v.shape == like.shape else None


class Sampling(Protocol):
    """What draws independent samples of the inner objective."""

    @property
    def fresh(self) -> bool:
        """Whether every inner loss was registered with data to draw samples from."""
        ...

    @property
    def note(self) -> str:
        """Where samples come from, if that is worth telling."""
        ...

    def ticket(self, step: StepRecord | None = None, full: bool = False) -> Ticket:
        """A new ticket for samples like the given step, or the last recorded one.

        With ``full``, every sample is the mean over all data.
        """
        ...

    def number(self, call: Call) -> tuple[int, int]:
        """The number of the batch a call was made on, and how many there are."""
        ...

    def outer(self, calls: Sequence[WeightedCall]) -> Sequence[WeightedCall]:
        """The outer calls of a full pass over their data, or these where there is none."""
        ...


@dataclass
class Situation:
    """What an estimator may look at.

    Attributes:
        problem: losses and variables at the user's live parameters.
        window: the recorded steps.
        optimizers: the inner optimizers, at their present state.
        loop: what the user declared about the inner loop.
        memory: what survives outer steps; read, not written.
        sampler: draws independent samples of the inner objective.
        outer_calls: the calls of outer losses that are differentiated, with weights.
        products: the engine of implicit and stochastic estimators.
    """

    problem: BilevelProblem
    window: Window
    optimizers: Sequence[torch.optim.Optimizer]
    loop: Loop
    memory: EstimatorMemory
    sampler: Sampling
    outer_calls: Sequence[WeightedCall] = ()
    products: Products = DoubleBackward()


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
        solver: what the linear solver is to remember after the outer step.
        bound: on ‖gradient − ∇Φ‖, where it was asked for, 0-d.
        directions: what direction memories are to remember after the outer step.
        notes: approximations worth telling, one phrase each.
    """

    gradient: Tensor
    reached: list[bool]
    steps: int
    hessian_steps: int = 0
    solution: Solution | None = None
    adjoint: Tensor | None = None
    solver: Memory | None = None
    bound: Tensor | None = None
    directions: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


SINCE = "all steps since the last outer step"


@dataclass(frozen=True)
class Wording:
    """What an estimator does, in words; see `BilevelOptimizer.explain`.

    Attributes:
        adjoint: what becomes of v.
        batches: which inner batches are used.
        problem: what is asked of the inner problem; None where its stationarity is.
        products: how second-order products are computed; None where ``products=`` says it.
    """

    adjoint: str
    batches: str
    problem: str | None = None
    products: str | None = None


class Estimator(abc.ABC):
    """A way to compute the hypergradient; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    needs_outer_loss: ClassVar[bool] = True  # whether a task without one learns nothing
    unrolls: ClassVar[bool] = (
        False  # whether it is of the steps taken, not of their limit
    )
    follows: ClassVar[bool] = False  # whether `follow` is to be called after every step
    frozen_constant: ClassVar[bool] = True  # what is not trained is no function of x
    partial: ClassVar[bool] = False  # x moves on one sample: many entries receive zero

    extrapolates: ClassVar[bool] = False  # whether `query` says where x is to stand

    @property
    def directs(self) -> bool:
        """Whether `direct` is to be called before every inner step."""
        return False

    def wording(self, fresh: bool) -> Wording:
        """What it does, in words.

        Args:
            fresh: whether every inner loss was registered with data to draw samples from.
        """
        return Wording(
            adjoint="none; the gradient is carried back through the recorded steps",
            batches=f"{SINCE}, in order",
            problem="replayed",
        )

    @abc.abstractmethod
    def new_window(self, max_bytes: int | None) -> Window:
        """An empty window that records what this estimator needs."""

    def last(self, fresh: bool) -> int | None:
        """How many of the window's last steps it is about; None is about all.

        Args:
            fresh: as in `wording`.
        """
        return self.new_window(None).last

    def check(  # noqa: B027  (most estimators accept every optimizer)
        self, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Refuse optimizers this estimator cannot work with.

        Raises:
            NoUpdateRule: it needs a rule that is not known.
        """

    def differentiating(
        self, problem: BilevelProblem, window: Window
    ) -> contextlib.AbstractContextManager:
        """What losses are differentiated under: whether parameters frozen now are constants."""
        if self.frozen_constant:
            return contextlib.nullcontext()
        begun = [t in problem.outer for t in problem.inner.tensors]  # initialisations
        moved = window.moved or begun
        return problem.inner.moving([a or b for a, b in zip(moved, begun, strict=True)])

    def check_outer(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Refuse an outer optimizer this estimator cannot work with.

        Raises:
            BilevelError: with what to write.
        """

    def query(
        self, state: dict[str, Any], start: Tensor, end: Tensor, lr: Tensor
    ) -> Tensor:
        """Where the outer variables are to stand after an outer step.

        Only called if ``extrapolates``; updates ``state``.

        Args:
            state: what survives outer steps.
            start: where they stood, flat.
            end: where the outer optimizer took them.
            lr: its learning rate, per entry.
        """
        return end

    def follow(self, situation: Situation) -> None:  # noqa: B027
        """Look at the inner step that has just been recorded, before an outer step is due.

        Only called if ``follows``, inside `differentiating`; what is gathered lives in the window.

        Args:
            situation: problem, window, optimizers.
        """

    def direct(self, situation: Situation, step: StepRecord) -> None:  # noqa: B027
        """Replace the gradients the inner optimizer is about to consume, in ``.grad``.

        Only called if ``directs``; its memory is written.

        Args:
            situation: problem, window, optimizers.
            step: the step about to be taken.
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
