"""A⁻¹ replaced by a multiple of the identity: T1–T2, the one-step approximation of DARTS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from .base import Memory, Operator, Solution, Solver, solution


@dataclass(frozen=True)
class Identity(Solver):
    """v = scale · b, without any product with A.

    With ``scale`` equal to the inner learning rate this is T1–T2 (Luketina et al. 2016) and the
    one-step gradient of DARTS (Liu et al. 2019): the first term of the Neumann series. Cheap
    and biased; a baseline. The residual is not known and reported as NaN.

    Args:
        scale: the multiple, in units of 1/curvature.

    Example:
        >>> import torch
        >>> from torch_bilevel.solvers import Identity, Operator
        >>> Identity(scale=0.5).solve(Operator(torch.neg, 1), torch.tensor([4.])).value
        tensor([2.])
    """

    scale: float = 1.0

    name: ClassVar[str] = "identity"
    uses_start: ClassVar[bool] = False
    solves: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.real("Identity", "scale", self.scale, positive=True)

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`; ``x0`` is not used."""
        return solution(self.scale * b, torch.full_like(b.sum(), torch.nan))
