"""Implicit differentiation on independent samples of the inner objective (nested methods).

    v ≈ (E H)⁻¹ ∂_y f      by a solver that draws a new sample for every product
    ĝ = ∂_x f − (1/J) Σ_j J_{ζ_j} v

stocBiO and BSA differ in the solver, SID in the solver and J, MRBO, SUSTAIN and VRBO in what
their two directions remember: with a memory, the gradient that the inner optimizer is about to
consume is replaced too, and ĝ is evaluated where the last inner step started (SARAH: where each
did).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks
from .._registry import changed, describe
from ..errors import UnknownName
from ..inner import RULES, StepRecord, Window, stationarity
from ..problem import OuterGradients, Ticket, mean_calls
from ..solvers import Operator, Solver, StochasticNeumann
from .base import Estimate, Estimator, Situation, Wording
from .memory import DirectionMemory, Plain, parse_memory
from .points import at_point, check_memory, direct, present, walk
from .system import System, check_declared, mean_cross, with_declared


@dataclass(frozen=True)
class Stochastic(Estimator):
    """Implicit differentiation with independent samples for every product.

    Samples come from the data an inner loss was registered with, ``inner_loss(data=...)``; without
    it recorded steps are drawn again, and the report says so.

    Needs: inner parameters close to stationary. Costs: the solver's products, each on a new
    sample (a gradient with its graph), and J gradients with a cross product. With a memory that
    looks back everything twice; with `Sarah` and `Page`, as in VRBO, for every step of the window.

    Args:
        solver: a solver that draws a new sample for every product.
        hessian_batches: batches of the first sample of H, B Q in stocBiO's theory.
        hessian_ratio: factor from one sample to the next, 1 − η μ in stocBiO's theory.
        cross_batches: J; None takes as many as the window has steps, and with samples from the
            window the whole window once. (One, where ĝ is updated at every inner step.)
        damping: added to the diagonal of H, in units of curvature.
        warm_start: start the solve from the adjoint of the last outer step.
        memory: of the inner direction (in ``.grad``) and of the outer one; a name or an object.

    Raises:
        UnknownName: the solver is not made for new samples, or there is no such memory.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.Stochastic(tb.StochasticNeumann(4), memory=tb.Storm()))
        "stochastic_neumann(num_steps=4, memory='storm')"
    """

    solver: Solver = StochasticNeumann()
    hessian_batches: int = 1
    hessian_ratio: float = 1.0
    cross_batches: int | None = None
    damping: float = 0.0
    warm_start: bool = False
    memory: DirectionMemory | str = Plain()

    name: ClassVar[str] = "stochastic"

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver) or not self.solver.stochastic:
            raise UnknownName(
                f"Stochastic(solver={self.solver!r}): the solver must be made for a new sample in "
                "every product, such as StochasticNeumann() or StochasticRichardson(). Others "
                "belong to Implicit(...), which uses recorded batches."
            )
        _checks.positive_int("Stochastic", "hessian_batches", self.hessian_batches)
        _checks.positive_int(
            "Stochastic", "cross_batches", self.cross_batches, optional=True
        )
        _checks.real("Stochastic", "hessian_ratio", self.hessian_ratio, positive=True)
        _checks.real("Stochastic", "damping", self.damping)
        object.__setattr__(self, "memory", parse_memory(self.memory))

    def __str__(self) -> str:
        options = {k: v for k, v in changed(self).items() if k != "solver"}
        if "memory" in options:
            options["memory"] = str(self.memory)
        return describe(self.solver.name, {**changed(self.solver), **options})

    @property
    def directs(self) -> bool:
        """With a memory; see `Estimator.directs`."""
        return not isinstance(self.memory, Plain)

    def wording(self, fresh: bool) -> Wording:
        """See `Estimator.wording`."""
        start = "the last outer step's" if self.warm_start else "zero"
        where = "data=" if fresh else "the steps since the last outer step, drawn again"
        count = self.cross_batches or "as many as there were inner steps"
        return Wording(
            adjoint=f"solved for by {self.solver} on new samples, from {start}",
            batches=f"H and J from new samples ({where}); J averaged over {count}",
        )

    def new_window(self, max_bytes: int | None) -> Window:
        """A window of calls; with a memory, of iterates."""
        return Window(iterates=self.directs, max_bytes=max_bytes)

    def last(self, fresh: bool) -> int | None:
        """The last step says which losses to sample; see `Estimator.last`."""
        return 1 if fresh else None

    def check(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Refuse optimizers whose weight decay, or with a memory whose number, is not known."""
        for optimizer in optimizers:
            stationarity(optimizer, RULES)
        check_memory(self, optimizers)

    def direct(self, situation: Situation, step: StepRecord) -> None:
        """The remembered inner direction into ``.grad``; see `Estimator.direct`."""
        assert isinstance(self.memory, DirectionMemory)
        direct(self.memory, situation, step)

    def estimate(self, situation: Situation, outer: OuterGradients) -> Estimate:
        """∇̂Φ = ∂_x f − mean J_ζ v; see `Estimator.estimate`."""
        check_declared(situation)
        if not self.directs:
            found = self.sampled(situation, outer, situation.sampler.ticket())
        else:
            found = self._remembered(situation)
        found.notes += [situation.sampler.note] if situation.sampler.note else []
        return found

    def sampled(
        self, situation: Situation, outer: OuterGradients, ticket: Ticket
    ) -> Estimate:
        """One estimate at the present point.

        Args:
            situation: problem, window, memory.
            outer: value and partial gradients of f, here.
            ticket: what samples are drawn from.
        """
        problem, decay, used = situation.problem, self.damping, set()

        def sample(number: int) -> Operator:
            used.add(number)
            count = math.ceil(self.hessian_batches * self.hessian_ratio**number)
            calls = mean_calls(ticket.samples(("H", number), max(1, count)))
            return Operator(System(situation, calls, decay).product, len(outer.inner))

        last = situation.window.steps()[-1]
        at = System(situation, last.calls, decay)  # good enough for step sizes
        operator = Operator(
            at.product,
            len(outer.inner),
            at.symmetric,
            sample=sample,
            integer=ticket.integer,
        )
        warm = self.warm_start and self.solver.uses_start
        x0 = situation.memory.start(outer.inner, warm)
        solution = self.solver.solve(operator, outer.inner, x0, situation.memory.solver)
        at.forget()
        v, crossed = solution.value, ticket.samples("J", self.cross_batches)
        Jv, reached = mean_cross(problem, crossed, at, v)
        Jv, reached = with_declared(situation, last, at, v, Jv, reached)
        return Estimate(
            gradient=outer.outer - Jv,
            reached=[a or b for a, b in zip(outer.reached, reached, strict=True)],
            steps=len(crossed),
            hessian_steps=len(used),
            solution=solution,
            adjoint=v,
            notes=at.notes,
        )

    def _remembered(self, situation: Situation) -> Estimate:
        """The remembered direction after the window, where its steps started."""
        memory, problem = self.memory, situation.problem
        assert isinstance(memory, DirectionMemory)
        state = memory.begin(situation.memory.directions.get("outer", {}))
        one = memory.every_step and self.cross_batches is None
        single = replace(self, cross_batches=1) if one else self
        x, found = problem.outer.read(), None
        with problem.inner.swapped():
            for step, y in walk(situation, last=not memory.every_step):
                full = memory.refreshes(state)
                ticket = situation.sampler.ticket(step, full)
                calls = situation.outer_calls
                calls = situation.sampler.outer(calls) if full else calls
                found = single.sampled(
                    situation, problem.outer_gradients(calls), ticket
                )

                def old(calls: Any = calls, ticket: Ticket = ticket) -> Tensor:
                    with at_point(problem, state["x"], state["y"]):
                        outer = problem.outer_gradients(calls)
                        return single.sampled(situation, outer, ticket).gradient

                def row(step: StepRecord = step) -> tuple[int, int]:
                    return situation.sampler.number(present(step))

                found.gradient = memory.direction(state, found.gradient, old, row)
                state["x"], state["y"] = x, y
        assert found is not None
        found.directions = {"outer": state}
        return found
