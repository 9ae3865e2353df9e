"""Approximate implicit differentiation (AID).

At a stationary point of the inner problem the implicit function theorem gives

    ∇Φ = ∂_x f − J v,        H v = ∂_y f

with H, J the derivatives of the inner optimizer's *stationarity* residual s·∇_y g + D y, so
weight decay in the optimizer is part of the system (Pedregosa 2016; Grazzi et al. 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks
from .._registry import changed, describe
from ..errors import (
    BilevelError,
    InvalidHyperparameters,
    NonSymmetricSystem,
    UnknownName,
)
from ..inner import RULES, HyperAdjoint, StepRecord, Window, stationarity
from ..problem import BilevelProblem, Linearization, OuterGradients
from ..solvers import CG, Operator, Solver
from .base import Estimate, Estimator, Situation


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

    name: ClassVar[str] = "implicit"

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise UnknownName(
                f"Implicit(solver={self.solver!r}): solver must be a linear solver object such "
                "as CG(), or write estimator='cg'."
            )
        _checks.positive_int("Implicit", "hessian_calls", self.hessian_calls)
        _checks.positive_int("Implicit", "cross_calls", self.cross_calls, optional=True)
        _checks.real("Implicit", "damping", self.damping)

    def __str__(self) -> str:
        options = {k: v for k, v in changed(self).items() if k != "solver"}
        return describe(self.solver.name, {**changed(self.solver), **options})

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
        proximal = situation.loop.proximal
        if situation.problem.initial and proximal is None:
            raise BilevelError(
                "A parameter is in both optimizers (an initialisation), and the minimum that an "
                "implicit estimator describes does not depend on where the inner loop began. Use "
                "'unrolled', 'forward_gradient' or 'first_order', or pull the inner parameters "
                "to the initialisation: proximal_term=1.0 (iMAML)."
            )
        if situation.loop.rates is not None:
            raise InvalidHyperparameters(
                "optimizer.learn_rates() was called, and the point where an inner optimizer comes "
                "to rest does not depend on rates, so an implicit estimator has no gradient for "
                "them. Use 'unrolled'."
            )
        steps = situation.window.steps()
        curved, crossed = (
            steps[-self.hessian_calls :],
            steps[-(self.cross_calls or 0) :],
        )
        at = System(situation, curved, self.damping)
        operator = Operator(at.product, outer.inner.numel(), at.symmetric)
        if self.solver.needs_symmetric and not operator.symmetric:
            raise NonSymmetricSystem(
                f"{self} needs a symmetric system, and some parameter groups are maximised while "
                "others are minimised, which makes it non-symmetric. Use 'direct', "
                "'richardson' or 'neumann'."
            )
        warm = self.warm_start and self.solver.uses_start
        x0 = situation.memory.adjoint if warm else None
        if x0 is not None and x0.shape != outer.inner.shape:
            x0 = None
        found = self.solver.solve(operator, outer.inner, x0, situation.memory.solver)
        if len(curved) == len(crossed):
            Jv, reached = at.cross(found.value), at.linearization.reached
        else:
            del at.linearization
            Jv, reached = mean_cross(situation.problem, crossed, at, found.value)
        if situation.loop.hyperparameters is not None:
            through, touched = decay_cross(situation, steps[-1], found.value)
            Jv = Jv + through
            reached = [a or b for a, b in zip(reached, touched, strict=True)]
        if proximal is not None:  # a enters r as −λ s ∘ a
            pulled = proximal.weight * at.signed(found.value)
            Jv = Jv - situation.problem.from_initial(pulled)
            reached = [
                a or direct is None
                for a, direct in zip(reached, situation.problem.direct, strict=True)
            ]
        return Estimate(
            gradient=outer.outer - Jv,
            reached=[a or b for a, b in zip(outer.reached, reached, strict=True)],
            steps=len(crossed),
            hessian_steps=len(curved),
            solution=found,
            adjoint=found.value,
            notes=["decoupled weight decay held at its present preconditioner"]
            if at.frozen
            else [],
        )


class System:
    """The linear system of the inner optimizer's fixed point, averaged over some steps.

    r(y, x) = s ∘ ∇_y g(x, y) + D ∘ y;    ∂_y r = s ∘ H + D,    ∂_x r = s ∘ Jᵀ

    With a proximal term, D includes its s·λ.

    Args:
        situation: problem and optimizers.
        steps: the steps whose losses define g.
        damping: added to the diagonal.
    """

    linearization: Linearization

    def __init__(
        self, situation: Situation, steps: Sequence[StepRecord], damping: float
    ):
        problem = situation.problem
        self.linearization = problem.linearize(mean_calls(steps))
        known = [s for o in situation.optimizers for s in stationarity(o, RULES)]
        self.frozen = any(item.frozen for item in known)
        self.symmetric = len({item.sign for item in known}) == 1
        self.sign: Tensor | None = None
        self.decay: Tensor | float = damping
        proximal = situation.loop.proximal
        pull = 0.0 if proximal is None else proximal.weight
        if any(item.sign != 1 for item in known):
            self.sign = _spread(problem, [item.sign for item in known])
        # r = s ∘ (∇_y g + λ (y − a)) + D ∘ y: the proximal term is a decay of the loss's sign
        decays = [item.decay + pull * item.sign for item in known]
        if any(isinstance(decay, Tensor) or decay != 0 for decay in decays):
            self.decay = _spread(problem, decays) + damping

    def signed(self, v: Tensor) -> Tensor:
        """S ∘ v."""
        return v if self.sign is None else self.sign * v

    def product(self, v: Tensor) -> Tensor:
        """(∂_y r)ᵀ v = H (s ∘ v) + D ∘ v; symmetric when s is one sign throughout."""
        Hv = self.linearization.hvp(self.signed(v))
        return (
            Hv
            if isinstance(self.decay, float) and not self.decay
            else Hv + self.decay * v
        )

    def cross(self, v: Tensor) -> Tensor:
        """J (s ∘ v)."""
        return self.linearization.cross(self.signed(v))


def _spread(problem: BilevelProblem, values: Sequence[Any]) -> Tensor:
    """One value per parameter as a flat vector."""
    return problem.inner.layout.flatten(
        [
            value
            if isinstance(value, Tensor)
            else torch.full_like(tensor, value, requires_grad=False)
            for value, tensor in zip(values, problem.inner.tensors, strict=True)
        ]
    )


def mean_calls(steps: Sequence[StepRecord]) -> list:
    """All calls of some steps, weighted so that the steps are averaged."""
    if len(steps) == 1:
        return steps[0].calls
    return [
        (call, weight / len(steps)) for step in steps for call, weight in step.calls
    ]


def mean_cross(
    problem: BilevelProblem, steps: Sequence[StepRecord], at: System, v: Tensor
) -> tuple[Tensor, list[bool]]:
    """J v averaged over steps, one graph at a time, and which outer tensors it reaches."""
    total = problem.outer.layout.zeros()
    reached = [False] * len(problem.outer.tensors)
    for step in steps:
        here = problem.linearize(step.calls)
        total += here.cross(at.signed(v))
        reached = [a or b for a, b in zip(reached, here.reached, strict=True)]
    return total / len(steps), reached


def decay_cross(
    situation: Situation, step: StepRecord, v: Tensor
) -> tuple[Tensor, list[bool]]:
    """∂_x⟨D(x) ∘ y, v⟩ for weight decay that outer variables determine.

    Args:
        situation: problem, optimizers and the registered function.
        step: the last inner step, whose hyperparameters are the present ones.
        v: the adjoint.

    Returns:
        It, flat, of the outer layout, and which outer tensors it reaches.

    Raises:
        InvalidHyperparameters: the function determines anything but weight decay.
    """
    problem, optimizers = situation.problem, situation.optimizers
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    hyper = HyperAdjoint(situation.loop.hyperparameters, step.position, groups)
    wrong = {
        key
        for values in hyper.groups
        for key, value in values.items()
        if key not in ("weight_decay", "params") and _differentiated(value)
    }
    if wrong:
        raise InvalidHyperparameters(
            f"{', '.join(sorted(wrong))} depend(s) on outer variables, and the point where an "
            "inner optimizer comes to rest does not depend on it, so an implicit estimator has no "
            "gradient for it. Use 'unrolled'. (Weight decay works with both.)"
        )
    first, known = 0, []
    with torch.enable_grad():
        for optimizer in optimizers:
            count = len(optimizer.param_groups)
            known += stationarity(optimizer, RULES, hyper.groups[first : first + count])
            first += count
        terms = [
            (item.decay * y.detach() * part).sum()
            for item, y, part in zip(
                known,
                problem.inner.tensors,
                problem.inner.layout.split(v),
                strict=True,
            )
            if _differentiated(item.decay)
        ]
        if terms:
            total = torch.stack([term.to(terms[0].device) for term in terms]).sum()
            hyper.bars = list(torch.autograd.grad(total, hyper.leaves))
    parts = hyper.to_outer(problem.outer.tensors)
    return problem.outer.layout.flatten(parts), [part is not None for part in parts]


def _differentiated(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_differentiated, value))
    return isinstance(value, Tensor) and value.requires_grad
