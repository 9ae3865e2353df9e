"""Reptile (Nichol, Achiam & Schulman 2018): move the initialisation towards where steps ended.

    ĝ = y_0 − y_K

No outer loss and no second derivatives: the displacement itself is the gradient that the outer
optimizer is given. With plain SGD and rate ε as ``outer``, y_0 ← y_0 + ε (y_K − y_0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import NoInnerStep
from ..inner import Window
from ..problem import OuterGradients
from .base import SINCE, Estimate, Estimator, Situation, Wording


@dataclass(frozen=True)
class Displacement(Estimator):
    """The displacement of the initialisations in a task, as their gradient (Reptile).

    Needs: nothing; a task in which no outer loss was back-propagated gives its displacement when
    it ends. Costs: one copy of the parameters, whatever the number of inner steps. Outer variables
    that are not initialisations receive the direct gradient of the outer loss, if there is one.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.Displacement())
        'displacement'
    """

    name: ClassVar[str] = "displacement"
    needs_outer_loss: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name

    def wording(self, fresh: bool) -> Wording:
        """See `Estimator.wording`."""
        return Wording(
            adjoint="none; how far the inner steps went",
            batches=f"{SINCE}, as they were taken",
            problem="as your loop took it",
            products="none",
        )

    def new_window(self, max_bytes: int | None) -> Window:
        """A window whose first iterate is copied."""
        return Window(iterates=True, checkpoint_every=2**62, max_bytes=max_bytes)

    def estimate(self, situation: Situation, outer: OuterGradients) -> Estimate:
        """ĝ = y_0 − y_K (+ ∂_x f); see `Estimator.estimate`."""
        problem, window = situation.problem, situation.window
        layout = problem.inner.layout
        first = window.records[0]
        if not first.has_iterate:
            raise NoInnerStep(
                "The steps since the last outer step were recorded for an estimator that keeps "
                "no iterates, so their displacement is not known. Set optimizer.estimator = "
                "'displacement' before the steps."
            )
        moved = layout.flatten(first.values()) - problem.inner.read()
        return Estimate(
            gradient=outer.outer + problem.from_initial(moved),
            reached=[
                there or tensor is None
                for there, tensor in zip(outer.reached, problem.direct, strict=True)
            ],
            steps=len(window),
            notes=["displacement of the initialisation (Reptile)"],
        )
