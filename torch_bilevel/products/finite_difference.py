"""Central differences of the inner gradient, for models without a second derivative.

    H v ≈ (∇_y g(x, y + εv) − ∇_y g(x, y − εv)) / 2ε,      J v ≈ the same of ∇_x g

With ε = ∛u (1 + ‖y‖)/‖v‖, u the rounding unit, truncation and rounding are of the same order,
u^{2/3} relative; points and differences are taken in float64, the gradients in the model's own
precision. In half precision, also that of an autocast region inside the loss, ∛u is too far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from ..problem import BilevelProblem, WeightedCall, added, by_frozen, precisions
from .base import Products, Substitute, moving, refuse_maps

HALF = 2e-2
"""The step in half precision.

∛u is 0.2 in bfloat16: on trained networks truncation alone was 0.02 to 3 then, for roundings of
single entries average out and curvature does not. At 0.02 errors are 0.03 to 0.14.
"""


@dataclass(frozen=True)
class CentralDifference(Products):
    """Differences of gradients; approximate.

    Needs: one derivative, taken with the kernels the loop itself runs (fused attention, cuDNN,
    compiled models). Costs: two gradients a product and no graph: the memory of training. Errors
    are about 1e-5 in float32 relative to ‖∇_y g‖/ε, 1e-10 in float64; 3 to 14 % of H v in
    bfloat16, where double backward's are below 1 %.

    Args:
        step: ε ‖v‖/(1 + ‖y‖); None takes ∛u of what gradients are computed in, at most 0.02.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.CentralDifference(step=1e-3))
        'finite_difference(step=0.001)'
    """

    step: float | None = None

    name: ClassVar[str] = "finite_difference"
    note: ClassVar[str | None] = "products by finite differences (approximate)"
    words: ClassVar[str] = (
        "central differences of gradients, two a product; approximate"
    )

    def __post_init__(self) -> None:
        _checks.real(
            "CentralDifference", "step", self.step, positive=True, optional=True
        )

    def linearize(
        self, problem: BilevelProblem, calls: Sequence[WeightedCall]
    ) -> DifferencedPoint:
        """See `Products.linearize`.

        Raises:
            NonSymmetricSystem: the inner problem is the fixed point of a map.
        """
        refuse_maps(self, calls)
        return DifferencedPoint(problem, calls, self.step)


class DifferencedPoint(Substitute):
    """Products by differences of gradients at y ± εv.

    Args:
        problem: the problem, at the point.
        calls: recorded calls with their weights.
        step: see `CentralDifference`.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        calls: Sequence[WeightedCall],
        step: float | None,
    ):
        super().__init__(problem, calls)
        parts = [t.detach().double().reshape(-1) for t in problem.inner.tensors]
        self.y = torch.cat([part.to(problem.inner.layout.device) for part in parts])
        if step is None:
            units = [torch.finfo(d).eps for d in precisions(problem, calls)]
            step = min(max(units) ** (1 / 3), HALF)
        self.size = step * (1 + torch.linalg.vector_norm(self.y))

    def product(self, v: Tensor, inner: bool, outer: bool) -> tuple[Tensor, Tensor]:
        """See `Point.product`."""
        problem = self.problem
        total: list[Tensor | None] = []
        with problem.inner.swapped():
            for frozen, calls in by_frozen(self.calls):
                w = moving(problem, v, frozen).double()
                norm = torch.linalg.vector_norm(w)
                step = torch.where(norm > 0, self.size / norm, 1.0)
                ends = [
                    self._gradients(calls, w, sign * step, outer) for sign in (1, -1)
                ]
                parts = [
                    None if a is None or b is None else (a - b) / (2 * step)
                    for a, b in zip(*ends, strict=True)
                ]
                total = added(total, parts)
        count = len(problem.inner.tensors)
        H, J = total[:count], total[count:]
        if outer:
            self.reach(J)
        return self.flat(H, J, inner, outer)

    def _gradients(
        self, calls: Sequence[WeightedCall], w: Tensor, step: Tensor, outer: bool
    ) -> list[Tensor | None]:
        """∇_y g and, if ``outer``, ∇_x g at y + step·w, in float64."""
        problem = self.problem
        problem.inner.overwrite(problem.inner.layout.split(self.y + step * w))
        found = problem.inner_gradients(calls, once=True, outer=outer)
        return [None if part is None else part.double() for part in found]
