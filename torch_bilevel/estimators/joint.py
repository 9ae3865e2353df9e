"""Single-loop methods: y, v and x move together, each along one sampled direction.

    D_y = ∇_y g_i(x, y)     D_v = H_i v − ∂_y f_j(x, y)     D_x = ∂_x f_j(x, y) − J_i v

all at the old point (Dagréou et al. 2022, with v of the opposite sign). The inner optimizer steps
along D_y; v ← v − ρ D_v is the library's; the outer optimizer steps along D_x. SOBA remembers
nothing, SABA keeps a SAGA table of every sum, SRBA takes SARAH's differences, MA-SOBA averages D_x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks
from .._registry import changed, describe
from ..errors import BilevelError
from ..inner import RULES, StepRecord, Window, stationarity
from ..problem import OuterGradients, WeightedCall
from ..solvers import Operator, solution
from ..solvers.richardson import safer_step
from .base import Estimate, Estimator, Situation, Wording
from .memory import DirectionMemory, Plain, parse_memory
from .points import at_point, check_memory, direct, present, walk
from .system import System, check_declared, with_declared


@dataclass(frozen=True)
class Joint(Estimator):
    """Single-loop directions: v is state and moves once for every inner step.

    With several inner steps in a window, v moves at each of them and x along the mean of D_x; with
    ``inner_steps=1`` it is the published algorithm. The reported residual is that before the
    last step, ‖D_v‖/(‖H v‖ + ‖∂_y f‖).

    Needs: one inner optimizer. Costs: for every inner step a gradient with its graph, one joint
    product and an evaluation of the outer loss, and the iterate it started from; twice that with a
    memory that looks back. Tables of `Saga` take 2 p + d numbers for an inner batch and p + d
    for an outer one.

    Args:
        adjoint_lr: ρ, the step of v; None takes the learning rate of the inner optimizer's first
            group, so that its schedule holds for both.
        damping: added to the diagonal of H, in units of curvature.
        memory: of the directions of y and v, and of x; a name or an object.
        outer_memory: of the direction of x, where it is another one.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.Joint(memory=tb.Saga()))
        "joint(memory='saga')"
    """

    adjoint_lr: float | None = None
    damping: float = 0.0
    memory: DirectionMemory | str = Plain()
    outer_memory: DirectionMemory | str | None = None

    name: ClassVar[str] = "joint"
    partial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.real(
            "Joint", "adjoint_lr", self.adjoint_lr, positive=True, optional=True
        )
        _checks.real("Joint", "damping", self.damping)
        object.__setattr__(self, "memory", parse_memory(self.memory))
        if self.outer_memory is not None:
            object.__setattr__(self, "outer_memory", parse_memory(self.outer_memory))

    def __str__(self) -> str:
        options = changed(self)
        for key in ("memory", "outer_memory"):
            if key in options:
                options[key] = str(options[key])
        return describe(self.name, options)

    @property
    def directs(self) -> bool:
        """With a memory of the inner direction; see `Estimator.directs`."""
        return not isinstance(self.memory, Plain)

    def wording(self, fresh: bool) -> Wording:
        """See `Estimator.wording`."""
        rate = self.adjoint_lr or "the inner learning rate"
        return Wording(
            adjoint=f"state; a step of {rate} along H v − ∂_y f at every inner step",
            batches="each inner step's own batch, where the step started",
        )

    def new_window(self, max_bytes: int | None) -> Window:
        """A window of iterates."""
        return Window(iterates=True, max_bytes=max_bytes)

    def last(self, fresh: bool) -> int | None:
        """It is about the present step; see `Estimator.last`."""
        return 1

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
        """D_x averaged over the window, and v after it; see `Estimator.estimate`."""
        check_declared(situation)
        problem = situation.problem
        walking = Walking(self, situation)
        total, steps = problem.outer.layout.zeros(), 0
        risky, memory = None, situation.memory.solver
        if memory.eigenvalue is None:  # looked at once, at no cost in later steps
            at = System(situation, situation.window.steps()[-1].calls, self.damping)
            operator = Operator(at.product, len(walking.v), at.symmetric)
            risky = safer_step(operator, walking.v, walking.rate, memory)
            at.forget()
        with problem.inner.swapped():
            for step, y in walk(situation):
                total += walking.advance(step, y)
                steps += 1
        assert walking.at is not None
        return Estimate(
            gradient=total / steps,
            reached=[
                a or b for a, b in zip(outer.reached, walking.reached, strict=True)
            ],
            steps=steps,
            hessian_steps=steps,
            solution=solution(
                walking.v,
                walking.residual,
                num_steps=torch.tensor(steps),
                diverged=~torch.isfinite(walking.v).all(),
                safe_step=risky,
                risky_step=risky is not None,
            ),
            adjoint=walking.v,
            directions={"outer": walking.state},
            notes=walking.at.notes,
        )


class Walking:
    """v and the remembered sums on the way through a window.

    Attributes:
        v: the adjoint.
        state: what the memories remember, per sum, and the last point.
        reached: per outer tensor, whether a step depends on it.
        residual: ‖D_v‖/(‖H v‖ + ‖∂_y f‖) of the last step.
        at: the system of the last step.
    """

    def __init__(self, estimator: Joint, situation: Situation):
        self.estimator = estimator
        self.situation = situation
        problem = situation.problem
        zeros = problem.inner.layout.zeros()
        v = situation.memory.start(zeros)
        self.v = zeros if v is None else v
        y_memory = parse_memory(estimator.memory)
        x_memory = parse_memory(estimator.outer_memory or y_memory)
        self.memories: dict[str, DirectionMemory] = {
            "Hv": y_memory,
            "fy": y_memory,
            "Jv": x_memory,
            "fx": x_memory,
        }
        known = situation.memory.directions.get("outer", {})
        self.state: dict[str, Any] = dict(known)
        for name, memory in self.memories.items():
            self.state[name] = memory.begin(known.get(name, {}))
        self.x = problem.outer.read()
        self.reached = [False] * len(problem.outer.tensors)
        self.residual = torch.zeros(())
        self.at: System | None = None
        rate = estimator.adjoint_lr
        self.rate = (
            situation.optimizers[0].param_groups[0]["lr"] if rate is None else rate
        )

    def advance(self, step: StepRecord, y: Tensor) -> Tensor:
        """Move v by one step; D_x, where the step started."""
        problem, state = self.situation.problem, self.state
        directions: dict[str, Tensor] = {}
        full = {
            name: memory.refreshes(state[name])
            for name, memory in self.memories.items()
        }

        @cache
        def new(full: bool) -> dict[str, Tensor]:
            calls, outer = self._calls(step, full)
            return self._sums(step, calls, outer, self.v)

        @cache
        def old() -> dict[str, Tensor]:
            with at_point(problem, state["x"], state["y"]):
                calls, outer = self._calls(step, False)
                return self._sums(step, calls, outer, state["v"])

        for name, memory in self.memories.items():
            directions[name] = memory.direction(
                state[name],
                new(full[name])[name],
                lambda name=name: old()[name],
                partial(self._row, step, inner=name in ("Hv", "Jv")),
            )
        state["x"], state["y"], state["v"] = self.x, y, self.v
        # v ← v − ρ (H v − ∂_y f)
        D_v = directions["Hv"] - directions["fy"]
        norm = torch.linalg.vector_norm
        size = norm(directions["Hv"]) + norm(directions["fy"])
        self.residual = torch.where(size > 0, norm(D_v) / size, 0.0)
        self.v = self.v - self.rate * D_v
        return directions["fx"] - directions["Jv"]

    def _calls(
        self, step: StepRecord, full: bool
    ) -> tuple[Sequence[WeightedCall], Sequence[WeightedCall]]:
        sampler, outer = self.situation.sampler, self.situation.outer_calls
        if not full:
            return step.calls, outer
        (everything,) = sampler.ticket(step, full).samples("all", 1)
        return everything, sampler.outer(outer)

    def _row(self, step: StepRecord, inner: bool) -> tuple[int, int]:
        """The number of the batch the inner or the outer sums are of, and how many there are."""
        number = self.situation.sampler.number
        if inner:
            return number(present(step))
        found = {number(call) for call, _ in self.situation.outer_calls}
        if len(found) != 1 or len(self.situation.outer_calls) != 1 < max(found)[1]:
            raise BilevelError(
                f"{self.estimator} looks up the batch of the outer loss in a table, and this outer "
                f"step averages over {len(self.situation.outer_calls)} of them. Use larger "
                "batches instead (batches=1), or 'soba'."
            )
        return found.pop()

    def _sums(
        self,
        step: StepRecord,
        calls: Sequence[WeightedCall],
        outer: Sequence[WeightedCall],
        v: Tensor,
    ) -> dict[str, Tensor]:
        """H v, J v, ∂_y f and ∂_x f on some calls at the present point."""
        f = self.situation.problem.outer_gradients(outer)
        self.at = System(self.situation, calls, self.estimator.damping)
        Hv, Jv = self.at.joint(v)
        reached = self.at.linearization.reached
        self.at.forget()
        Jv, reached = with_declared(self.situation, step, self.at, v, Jv, reached)
        self.reached = [a or b for a, b in zip(self.reached, reached, strict=True)]
        return {"Hv": Hv, "Jv": Jv, "fy": f.inner, "fx": f.outer}
