"""DARTS (Liu, Simonyan & Yang 2019): one step, and a finite difference for its only product.

    ∇Φ ≈ ∂_x f − J v,    v = η ∂_y f,    J v ≈ ‖v‖ [∇_x g(x, y + R v̂) − ∇_x g(x, y − R v̂)]/(2 R)

with v̂ = v/‖v‖: the step ε = R/‖v‖ along v of the paper, written so that v = 0 gives 0. It is the
implicit gradient with H⁻¹ replaced by η, or that of one unrolled step of gradient descent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from .._registry import changed, describe
from ..errors import BilevelError
from ..inner import RULES, Window, stationarity
from ..problem import BilevelProblem, OuterGradients, WeightedCall, mean_calls
from .base import SINCE, Estimate, Estimator, Situation, Wording
from .response_jacobian import rounding
from .system import System, check_declared, with_declared


def cross_difference(
    problem: BilevelProblem, calls: Sequence[WeightedCall], v: Tensor, radius: float
) -> tuple[Tensor, list[bool], Tensor]:
    """J v ≈ ‖v‖ [∇_x g(x, y + R v̂) − ∇_x g(x, y − R v̂)]/(2 R) at the present y.

    Args:
        problem: the problem; its parameters are put back at exit, also by exception.
        calls: the weighted calls that define g.
        v: flat, of the inner layout.
        radius: R.

    Returns:
        It, flat, of the outer layout; which outer tensors g depends on; and the share of the
        difference that may be rounding, of y ± R v̂ or of ∇_x g.
    """
    inner, outer = problem.inner.layout, problem.outer.layout
    norm, lost = torch.linalg.vector_norm(v), torch.zeros_like(v.sum())
    step = radius * torch.where(norm > 0, v / norm, 0.0)
    y, ends, reached = problem.inner.read(), [], [False] * len(outer.sizes)
    with problem.inner.swapped():
        for sign in (1, -1):
            problem.inner.overwrite(inner.split(y + sign * step))
            off = torch.linalg.vector_norm(problem.inner.read() - y - sign * step)
            lost = torch.maximum(lost, off / radius)
            parts = problem.inner_gradients(calls, outer=True, once=True)
            to_outer = parts[len(problem.inner.tensors) :]
            ends.append(outer.flatten(to_outer))
            reached = [part is not None for part in to_outer]
    difference = ends[0] - ends[1]
    whole, size = (torch.linalg.vector_norm(x) for x in (ends[0], difference))
    share = torch.where(size > 0, torch.finfo(whole.dtype).eps * whole / size, 0.0)
    Jv = norm.to(whole) * difference / (2 * radius)
    return Jv, reached, torch.maximum(lost, share.to(lost))


@dataclass(frozen=True)
class FiniteDifference(Estimator):
    """The gradient of one step of gradient descent, with first derivatives only (DARTS).

    Cheap and biased, as `Identity`, whose J v it takes a central difference of: the error of the
    difference is of order R², and zero where g is quadratic in y. J v is averaged over the steps
    since the last outer step, at the present y.

    Needs: inner parameters close to stationary, for what it approximates; no trajectory and no
    second derivatives. Costs: two gradients for each step that is averaged over.

    What differs from the paper: the step is the one your own optimizer has just taken, instead of
    a virtual one that is taken back, and the difference is taken around where it ended.

    Args:
        step_size: η; None is the learning rate of every parameter group, which is right for SGD.
            Adam's steps are not η times the gradient: pass the size that they come to.
        radius: R, how far the inner parameters are moved in all. In float32 a share of about
            1e-7 ‖∇_x g‖/(R ‖J v̂‖) of the difference is rounding.
        cross_calls: inner steps over which J v is averaged; None means the whole window.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> y, x = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> optimizer = tb.BilevelOptimizer(torch.optim.SGD([y], lr=0.25),
        ...     torch.optim.SGD([x], lr=0.1), estimator="darts")
        >>> train = optimizer.inner_loss(lambda: ((y - x) ** 2).sum())
        >>> valid = optimizer.outer_loss(lambda: ((y - 3) ** 2).sum())
        >>> train().backward(); _ = optimizer.step()
        >>> optimizer.hypergradient()[0].round(decimals=4)    # dy/dx = ½ times ∂_y f = −5
        tensor([-2.5000])
    """

    step_size: float | None = None
    radius: float = 0.01
    cross_calls: int | None = None

    name: ClassVar[str] = "darts"

    def __post_init__(self) -> None:
        _checks.real(
            "FiniteDifference",
            "step_size",
            self.step_size,
            positive=True,
            optional=True,
        )
        _checks.real("FiniteDifference", "radius", self.radius, positive=True)
        _checks.positive_int(
            "FiniteDifference", "cross_calls", self.cross_calls, optional=True
        )

    def __str__(self) -> str:
        return describe(self.name, changed(self))

    def wording(self, fresh: bool) -> Wording:
        """See `Estimator.wording`."""
        last = self.cross_calls
        return Wording(
            adjoint=f"one step, {self.step_size or 'the inner learning rate'} times ∂_y f",
            batches="J v a difference of two gradients, averaged over "
            + (f"the last {last} steps" if last else SINCE),
            products="none",
        )

    def new_window(self, max_bytes: int | None) -> Window:
        """A window of calls without iterates."""
        return Window(last=self.cross_calls, max_bytes=max_bytes)

    def check(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Refuse optimizers without a learning rate, or with an unknown weight decay."""
        self._rates(optimizers)
        for optimizer in optimizers:
            stationarity(optimizer, RULES)

    def estimate(self, situation: Situation, outer: OuterGradients) -> Estimate:
        """∇Φ ≈ ∂_x f − J v,  v = η ∂_y f; see `Estimator.estimate`."""
        check_declared(situation)
        problem = situation.problem
        steps = situation.window.steps(self.cross_calls)
        calls = mean_calls([step.calls for step in steps])
        v = outer.inner * self._spread(problem, situation.optimizers)
        at = System(situation, calls, damping=0.0)
        found = cross_difference(problem, calls, at.signed(v), self.radius)
        Jv, reached, lost = found
        Jv, reached = with_declared(situation, steps[-1], at, v, Jv, reached)
        return Estimate(
            gradient=outer.outer - Jv,
            reached=[a or b for a, b in zip(outer.reached, reached, strict=True)],
            steps=len(steps),
            notes=rounding(float(lost), "the difference", f"radius={self.radius}"),
        )

    def _rates(
        self, optimizers: Sequence[torch.optim.Optimizer]
    ) -> list[float | Tensor]:
        """η of every inner parameter."""
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = []
        for group in groups:
            rate = self.step_size or group.get("lr")
            if rate is None:
                raise BilevelError(
                    f"{self}: the inner optimizer has no learning rate (no 'lr' in its parameter "
                    "groups). Pass the size of a step: 'darts(step_size=0.1)'."
                )
            rates += [rate] * len(group["params"])
        return rates

    def _spread(
        self, problem: BilevelProblem, optimizers: Sequence[torch.optim.Optimizer]
    ) -> Tensor:
        """η of every inner number, flat."""
        dtype = problem.inner.layout.dtype
        pairs = zip(self._rates(optimizers), problem.inner.tensors, strict=True)
        return problem.inner.layout.flatten(
            [torch.ones_like(y, dtype=dtype, requires_grad=False) * r for r, y in pairs]
        )
