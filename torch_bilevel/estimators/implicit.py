"""Approximate implicit differentiation (AID).

At a stationary point of the inner problem the implicit function theorem gives

    ∇Φ = ∂_x f − J v,        H v = ∂_y f

with H, J the derivatives of the inner optimizer's *stationarity* residual s·∇_y g + D y, so
weight decay in the optimizer is part of the system (Pedregosa 2016; Grazzi et al. 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import _checks
from .._registry import changed, describe
from ..errors import NonSymmetricSystem, UnknownName
from ..inner import RULES, Window, stationarity
from ..problem import OuterGradients, mean_calls
from ..solvers import CG, Operator, Solver
from .base import SINCE, Estimate, Estimator, Situation, Wording
from .certificate import bound
from .system import System, check_declared, mean_cross, with_declared


@dataclass(frozen=True)
class Implicit(Estimator):
    """Implicit differentiation with any linear solver.

    H is that of the last ``hessian_calls`` inner steps; J v is averaged over the last
    ``cross_calls`` steps, by default over all since the last outer step, so that every training
    example used since then receives its share. Everything is evaluated at the present y.

    Needs: inner parameters close to stationary; no trajectory. Costs: the solver's products on
    ``hessian_calls`` batches, then about three gradients for each of the ``cross_calls`` steps.

    Args:
        solver: a linear solver.
        hessian_calls: inner steps whose loss defines H.
        cross_calls: inner steps over which J v is averaged; None means the whole window.
        damping: added to the diagonal of H, in units of curvature.
        warm_start: start the solve from the adjoint of the last outer step.
        certify: bound the error, in the report. Needs `BilevelOptimizer.smoothness`, an inner loss
            that is the same in every step (full batches), and costs three products and ‖J‖.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.Implicit(tb.CG(max_steps=10), damping=0.1))
        'cg(max_steps=10, damping=0.1)'
    """

    solver: Solver = CG()
    hessian_calls: int = 1
    cross_calls: int | None = None
    damping: float = 0.0
    warm_start: bool = True
    certify: bool = False

    name: ClassVar[str] = "implicit"

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise UnknownName(
                f"Implicit(solver={self.solver!r}): solver must be a linear solver object such "
                "as CG(), or write estimator='cg'."
            )
        if self.solver.stochastic:
            raise UnknownName(
                f"Implicit(solver={self.solver!r}): this solver takes a new sample in every "
                "product, and Implicit uses recorded batches. Write "
                f"Stochastic({type(self.solver).__name__}(...)), or its name."
            )
        _checks.positive_int("Implicit", "hessian_calls", self.hessian_calls)
        _checks.positive_int("Implicit", "cross_calls", self.cross_calls, optional=True)
        _checks.real("Implicit", "damping", self.damping)

    def __str__(self) -> str:
        options = {k: v for k, v in changed(self).items() if k != "solver"}
        return describe(self.solver.name, {**changed(self.solver), **options})

    def wording(self, fresh: bool) -> Wording:
        """See `Estimator.wording`."""
        warm = self.warm_start and self.solver.uses_start
        start = "warm-started from the last outer step" if warm else "from zero"
        over = f"the last {self.cross_calls} steps" if self.cross_calls else SINCE
        return Wording(
            adjoint=f"solved for by {self.solver}, {start}",
            batches=f"H from the last {self.hessian_calls} step(s), J v averaged over {over}",
        )

    def new_window(self, max_bytes: int | None) -> Window:
        """A window of calls without iterates."""
        last = self.cross_calls and max(self.cross_calls, self.hessian_calls)
        return Window(last=last, max_bytes=max_bytes)

    def check(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Refuse optimizers whose weight decay enters in an unknown way."""
        for optimizer in optimizers:
            stationarity(optimizer, RULES)

    def estimate(self, situation: Situation, outer: OuterGradients) -> Estimate:
        """∇Φ = ∂_x f − J v,  where  H v = ∂_y f; see `Estimator.estimate`."""
        check_declared(situation)
        curved = situation.window.steps(self.hessian_calls)
        crossed = situation.window.steps(self.cross_calls)
        at = System(
            situation, mean_calls([step.calls for step in curved]), self.damping
        )
        operator = Operator(
            at.product,
            outer.inner.numel(),
            at.symmetric,
            transpose=at.transpose,
            factors=at.factors,
            program=at.program,
        )
        if self.solver.needs_symmetric and not operator.symmetric:
            why = (
                "the inner problem is the fixed point of a map"
                if at.is_map
                else "some parameter groups are maximised while others are minimised"
            )
            raise NonSymmetricSystem(
                f"{self} needs a symmetric system, and {why}, which makes it non-symmetric. Use "
                "'gmres', 'neumann', 'richardson' or 'direct'."
            )
        warm = self.warm_start and self.solver.uses_start
        x0 = situation.memory.start(outer.inner, warm)
        found = self.solver.solve(operator, outer.inner, x0, situation.memory.solver)
        if len(curved) == len(crossed):
            Jv, reached = at.cross(found.value), at.linearization.reached
        else:
            if not self.certify:
                at.forget()
            calls = [step.calls for step in crossed]
            Jv, reached = mean_cross(situation.problem, calls, at, found.value)
        certified = (
            bound(situation, at, outer, found.value, Jv) if self.certify else None
        )
        Jv, reached = with_declared(situation, curved[-1], at, found.value, Jv, reached)
        return Estimate(
            gradient=outer.outer - Jv,
            reached=[a or b for a, b in zip(outer.reached, reached, strict=True)],
            steps=len(crossed),
            hessian_steps=len(curved),
            solution=found,
            bound=certified,
            adjoint=found.value,
            notes=at.notes,
        )
