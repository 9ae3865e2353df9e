"""First-order approximation (FOMAML, Finn et al. 2017; FO-ITD-BiO, Ji et al. 2021).

    ∇Φ ≈ ∂_x f,    and ∂_y f at the last iterate for an initialisation: ∂y_K/∂y_0 ≈ I

Every product with second derivatives is dropped; what enters through the inner loss only has no
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..inner import Window
from ..problem import OuterGradients
from .base import Estimate, Estimator, Situation, Wording


@dataclass(frozen=True)
class FirstOrder(Estimator):
    """The gradient of the outer loss at the last iterate, as if the inner steps were the identity.

    For initialisations and for variables of the outer loss (features); a variable of the inner
    loss alone receives nothing and is refused as unreached. Needs: nothing. Costs: one gradient
    of the outer loss, whatever the number of inner steps.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.FirstOrder())
        'first_order'
    """

    name: ClassVar[str] = "first_order"
    frozen_constant: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name

    def wording(self, fresh: bool) -> Wording:
        """See `Estimator.wording`."""
        return Wording(
            adjoint="none; the inner steps count as the identity",
            batches="none, only that of the outer loss",
            problem="as your loop took it",
            products="none",
        )

    def new_window(self, max_bytes: int | None) -> Window:
        """A window of the last step's calls."""
        return Window(last=1, max_bytes=max_bytes)

    def estimate(self, situation: Situation, outer: OuterGradients) -> Estimate:
        """∇Φ ≈ ∂_x f + ∂_y f at the initialisations; see `Estimator.estimate`."""
        problem = situation.problem
        return Estimate(
            gradient=outer.outer + problem.from_initial(outer.inner),
            reached=[
                there or direct is None
                for there, direct in zip(outer.reached, problem.direct, strict=True)
            ],
            steps=situation.window.count,
        )
