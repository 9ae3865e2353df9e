"""Response Jacobians by finite differences (PZOBO; Sow, Ji & Liang 2022): no second derivatives.

    ĝ = ∂_x f + (1/Q) Σ_j ⟨δ_j, ∂_y f⟩ u_j,    δ_j = (y_K(x + μ u_j) − y_K(x))/μ,    u_j ~ N(0, I)

y_K(x + μ u_j) is where the recorded inner steps end if they begin at the recorded start and see
the recorded batches (and dropout masks) with the outer variables moved. As μ → 0 the mean is the
gradient of `Unrolled`, with variance (d + 1)/Q times the squared norm of its indirect part, d
being the number of outer numbers. ∂_x f is exact and stays out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from .._registry import changed, describe
from .._vector import Layout
from ..errors import NoInnerStep, NonFinite
from ..inner import Rerun, Window
from ..problem import OuterGradients
from .base import SINCE, Estimate, Estimator, Situation, Wording, rules_of


def response_jacobian(
    run: Callable[[Tensor], Tensor],
    y: Tensor,
    adjoint: Tensor,
    directions: Iterable[Tensor],
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """(1/Q) Σ_j ⟨δ_j, a⟩ u_j,  δ_j = (y(x + μ u_j) − y(x))/μ.

    Args:
        run: y(x + Δ) of Δ.
        y: y(x).
        adjoint: a = ∂_y f.
        directions: the u_j, at least one.
        smoothing: μ.

    Returns:
        It, of the shape of x; and the smallest ‖y(x + μ u_j) − y(x)‖/‖y(x)‖.
    """
    total, count = torch.zeros(()), 0
    smallest = torch.full_like(y.sum(), torch.inf)
    for u in directions:
        difference = run(smoothing * u) - y
        along = torch.dot(difference, adjoint) / smoothing
        total, count = total.to(u) + along.to(u) * u, count + 1
        size, whole = (torch.linalg.vector_norm(v) for v in (difference, y))
        smallest = torch.minimum(smallest, size / whole)
    return total / count, smallest


def rounding(share: float, what: str, option: str) -> list[str]:
    """A note of a finite difference of which more than 1 % may be rounding."""
    if not share > 0.01:
        return []
    return [f"rounding may be {min(share, 1.0):.0%} of {what}: raise {option}"]


@dataclass(frozen=True)
class ResponseJacobian(Estimator):
    """The response of the recorded steps to random moves of the outer variables (PZOBO, PZOBO-S).

    For models whose operations have no second derivative, or where one product costs too much
    memory. Both runs of a difference see the same minibatches, which is what PZOBO-S asks for, so
    ``"pzobo_s"`` is the same estimator.

    Needs: an update rule for the inner optimizer. Costs: (Q + 1) K gradients for K inner steps and
    Q directions; memory is one iterate (parameters and optimizer state) and references to the
    batches of the window, whatever K. No products.

    What differs from the authors' released scripts: their directions have unit norm and no factor
    d makes up for it, so that the indirect part is shrunk by 1/d; here its mean is right. The
    inner steps are those of your own optimizer, momentum and all. Hypergradients of one window use
    the same directions; the next window has new ones.

    Args:
        directions: Q. Their noise is (d + 1)/Q of the squared norm of the indirect part.
        smoothing: μ, in the units of x: every entry moves by about μ. A difference is off by order
            μ where y_K bends in x, its mean over ± u by order μ². A share of about ε ‖y‖/(μ ‖δ‖) of
            it is rounding: in float32 values below 1e-3 lose digits, and the report says so where
            it is more than 1 %. In float64 1e-6 leaves neither to speak of.
        seed: of the directions, which have a generator of their own.
        window: run the last ``window`` steps only; None all since the last outer step.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> y = torch.zeros(1, requires_grad=True)
        >>> x = torch.ones(1, requires_grad=True)
        >>> optimizer = tb.BilevelOptimizer(torch.optim.SGD([y], lr=0.25),
        ...     torch.optim.SGD([x], lr=0.1), estimator="pzobo(directions=2000)")
        >>> train = optimizer.inner_loss(lambda: ((y - x) ** 2).sum())
        >>> valid = optimizer.outer_loss(lambda: ((y - 3) ** 2).sum())
        >>> train().backward(); _ = optimizer.step()
        >>> gradient, = optimizer.hypergradient()
        >>> bool((gradient / -2.5 - 1).abs() < 0.1)       # dy/dx = ½ times ∂_y f = −5
        True
    """

    directions: int = 10
    smoothing: float = 0.01
    seed: int = 0
    window: int | None = None

    name: ClassVar[str] = "pzobo"
    unrolls: ClassVar[bool] = True
    frozen_constant: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.positive_int("ResponseJacobian", "directions", self.directions)
        _checks.real("ResponseJacobian", "smoothing", self.smoothing, positive=True)
        _checks.positive_int("ResponseJacobian", "window", self.window, optional=True)

    def __str__(self) -> str:
        return describe(self.name, changed(self))

    def wording(self, fresh: bool) -> Wording:
        """See `Estimator.wording`."""
        last = f"the last {self.window} steps" if self.window else SINCE
        return Wording(
            adjoint="none; the response of the inner steps to random moves of x",
            batches=f"{last}, run again {self.directions + 1} times",
            problem="replayed",
            products="none",
        )

    def new_window(self, max_bytes: int | None) -> Window:
        """A window that keeps its first iterate, or one in every ``window`` steps."""
        return Window(
            last=self.window,
            iterates=True,
            checkpoint_every=self.window or 2**62,
            max_bytes=max_bytes,
        )

    def check(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Refuse optimizers without an update rule."""
        rules_of(optimizers)

    def basis(self, layout: Layout, number: int) -> Iterator[Tensor]:
        """The directions of a window, one after the other.

        Args:
            layout: of the outer variables.
            number: how many windows there were before.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        for _ in range(self.directions):
            u = torch.randn(layout.numel, generator=generator, dtype=layout.dtype)
            yield u.to(layout.device)

    def estimate(self, situation: Situation, outer: OuterGradients) -> Estimate:
        """ĝ = ∂_x f + (1/Q) Σ_j ⟨δ_j, ∂_y f⟩ u_j; see `Estimator.estimate`."""
        run = self.rerun(situation)
        # Differences are taken from the run at x: it rounds as the others do, and the optimizer's
        # own kernels need not.
        y = run()
        run.check(y)
        basis = self.basis(situation.problem.outer.layout, situation.window.number)
        gradient, size = response_jacobian(run, y, outer.inner, basis, self.smoothing)
        return Estimate(
            gradient=outer.outer + gradient,
            reached=run.reached(outer.reached),
            steps=len(run.steps),
            notes=self._notes(
                outer.inner, gradient, torch.maximum(run.eps / size, run.lost)
            ),
        )

    def rerun(self, situation: Situation) -> Rerun:
        """Where the steps of the window end, as a function of the outer variables.

        Raises:
            NoInnerStep: the window was recorded for an estimator that keeps no iterate.
        """
        steps, records = situation.window.steps(self.window), list(situation.window)
        if not records[0].has_iterate or not all(r.replayable for r in records):
            raise NoInnerStep(
                "The steps since the last outer step were recorded for an estimator that keeps "
                f"no iterate, so they cannot be run again. Set optimizer.estimator = {str(self)!r} "
                "before the steps it is to differentiate."
            )
        earlier = records[: len(records) - len(steps)]
        rules = rules_of(situation.optimizers)
        return Rerun(situation.problem, steps, earlier, rules, situation.loop)

    def _notes(self, adjoint: Tensor, gradient: Tensor, lost: Tensor) -> list[str]:
        finite, before, share = torch.stack(
            [
                v.to(lost)
                for v in (
                    torch.isfinite(gradient).all(),
                    torch.isfinite(adjoint).all(),
                    lost,
                )
            ]
        ).tolist()
        if before and not finite:
            raise NonFinite(
                f"With the outer variables moved by smoothing={self.smoothing} in random "
                "directions the inner steps end at values that are not finite. Pass a smaller "
                "smoothing, and write outer variables that have a domain (rates, weights) as exp "
                "or sigmoid of free ones."
            )
        return rounding(share, "a response", f"smoothing={self.smoothing}")
