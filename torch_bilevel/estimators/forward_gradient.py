"""Forward gradients (Baydin et al. 2022; (FG)²U, Shen et al. 2024): tangents along random signs.

    ĝ = ∂_x f + (1/b) Σ_i ⟨z_i, ∂_y f⟩ u_i,    u_i with entries ±1,    z_i = Z u_i

Unbiased for the gradient of `Unrolled`, with variance (d − 1)/b times the squared norm of its
indirect part, d being the number of outer numbers. ∂_x f is exact and stays out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from ..inner import Window
from ..problem import BilevelProblem
from .base import Estimator
from .forward import Following


@dataclass(frozen=True)
class ForwardGradient(Following, Estimator):
    """Forward mode along random directions: unbiased, for any number of outer variables.

    Needs: an update rule for the inner optimizer. Costs: for each inner step one more gradient
    and one product for each direction; memory is a tangent of parameters and optimizer state for
    each, whatever the number of steps.

    Args:
        directions: b, drawn anew after every outer step.
        seed: of the directions, which have a generator of their own.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.ForwardGradient(directions=8))
        'forward_gradient(directions=8)'
    """

    directions: int = 1
    seed: int = 0

    name: ClassVar[str] = "forward_gradient"

    def __post_init__(self) -> None:
        _checks.positive_int("ForwardGradient", "directions", self.directions)

    def new_window(self, max_bytes: int | None) -> Window:
        """A window of the last step only."""
        return Window(last=1, iterates=True, max_bytes=max_bytes)

    def basis(self, problem: BilevelProblem, number: int) -> Tensor:
        """Random signs; see `Following.basis`."""
        outer = problem.outer.layout
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        signs = torch.randint(0, 2, (self.directions, outer.numel), generator=generator)
        return (2 * signs - 1).to(outer.device, outer.dtype)

    def assemble(self, basis: Tensor, along: Tensor) -> Tensor:
        """The mean of ⟨z_i, ∂_y f⟩ u_i; see `Following.assemble`."""
        return along @ basis / self.directions
