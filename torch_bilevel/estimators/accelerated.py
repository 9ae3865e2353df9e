"""Extrapolated query points: the outer variables stand ahead of the iterates (AccBiO).

With G the hypergradient at the query point x̃, where the outer variables stand,

    z' = x̃ − α G                             your outer optimizer, plain SGD with lr = α
    x' = τ x̃ + (1 − τ) x − β G               β = √(α/μ), τ = √(α μ)/2
    x̃' = η x' + (1 − η) z'                   η = √(α μ)/(√(α μ) + 2)

for Φ strongly convex with constant μ (Ji & Liang 2021). Without μ, Nesterov's sequence for convex
functions with the restart of O'Donoghue & Candès (2015):

    x̃' = z' + (t − 1)/t' (z' − z),  t' = (1 + √(1 + 4 t²))/2;   t = 1 where ⟨G, z' − z⟩ > 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks
from .._registry import changed, describe
from ..inner import StepRecord, Window
from ..problem import OuterGradients
from .base import Estimate, Estimator, Situation, Wording


@dataclass(frozen=True)
class Accelerated(Estimator):
    """Any estimator, with the outer variables at AccBiO's extrapolated points.

    x, z and x̃ converge together; what your losses see is x̃. A number of outer steps proportional to
    √κ instead of κ, for Φ (strongly) convex. For the inner steps to keep pace use Nesterov's:
    ``SGD(lr=1/L, momentum=(√κ − 1)/(√κ + 1), nesterov=True)``.

    Needs: plain SGD as outer optimizer, with lr = α ≤ 1/(2 L_Φ). Costs: two vectors of the outer
    size.

    Args:
        base: the estimator of the hypergradient, a name or an object.
        strong_convexity: μ of Φ, in units of curvature; None restarts adaptively.

    Raises:
        UnknownName: there is no such estimator.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.Accelerated("cg(max_steps=5)", strong_convexity=0.1))
        "accelerated(base='cg(max_steps=5)', strong_convexity=0.1)"
    """

    base: Estimator | str = "heavy_ball"
    strong_convexity: float | None = None

    name: ClassVar[str] = "accelerated"
    extrapolates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        from . import parse  # names are known when all estimators are

        _checks.real(
            "Accelerated",
            "strong_convexity",
            self.strong_convexity,
            positive=True,
            optional=True,
        )
        object.__setattr__(self, "base", parse(self.base))
        for flag in (
            "needs_outer_loss",
            "unrolls",
            "follows",
            "frozen_constant",
            "partial",
        ):
            object.__setattr__(self, flag, getattr(self.base, flag))

    def __str__(self) -> str:
        options = {**changed(self), "base": str(self.base)}
        if options["base"] == "heavy_ball":  # the default, which is parsed by now
            del options["base"]
        return describe(self.name, options)

    @property
    def _base(self) -> Estimator:
        assert isinstance(self.base, Estimator)
        return self.base

    @property
    def directs(self) -> bool:
        """As ``base``; see `Estimator.directs`."""
        return self._base.directs

    def wording(self, fresh: bool) -> Wording:
        """As ``base``; see `Estimator.wording`."""
        return self._base.wording(fresh)

    def new_window(self, max_bytes: int | None) -> Window:
        """As ``base``; see `Estimator.new_window`."""
        return self._base.new_window(max_bytes)

    def last(self, fresh: bool) -> int | None:
        """As ``base``; see `Estimator.last`."""
        return self._base.last(fresh)

    def check(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """As ``base``; see `Estimator.check`."""
        self._base.check(optimizers)

    def check_outer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse all but plain SGD, whose step is z' = x̃ − α G."""
        _checks.plain_sgd(str(self), optimizer)

    def follow(self, situation: Situation) -> None:
        """As ``base``; see `Estimator.follow`."""
        self._base.follow(situation)

    def direct(self, situation: Situation, step: StepRecord) -> None:
        """As ``base``; see `Estimator.direct`."""
        self._base.direct(situation, step)

    def estimate(self, situation: Situation, outer: OuterGradients) -> Estimate:
        """As ``base``, at the query point; see `Estimator.estimate`."""
        return self._base.estimate(situation, outer)

    def query(
        self, state: dict[str, Any], start: Tensor, end: Tensor, lr: Tensor
    ) -> Tensor:
        """The next query point; see `Estimator.query`."""
        z_last, z = state.get("z", start), end
        state["z"] = z
        if self.strong_convexity is not None:
            root = torch.sqrt(lr * self.strong_convexity)
            x, tau, eta = state.get("x", start), root / 2, root / (root + 2)
            # x' = τ x̃ + (1 − τ) x − β G,  with β G = (β/α)(x̃ − z') and β/α = 1/√(α μ)
            step = torch.where(root > 0, (start - z) / root, torch.zeros_like(z))
            x = tau * start + (1 - tau) * x - step
            state["x"] = x
            return eta * x + (1 - eta) * z
        t = state.get("t", 1.0)
        if bool(torch.dot(start - z, z - z_last) > 0):
            t = 1.0  # the momentum points uphill
        state["t"] = (1 + math.sqrt(1 + 4 * t * t)) / 2
        return z + (t - 1) / state["t"] * (z - z_last)
