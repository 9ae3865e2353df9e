"""Any torch optimizer on the quadratic whose minimum is the solution (AmIGO, stochastic AID).

    min_v ½ vᵀ A v − bᵀ v

with the gradient A_{ζ_k} v − b on a new sample in every step.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks
from .._registry import suggest
from ..errors import UnknownName
from .base import Memory, Operator, Solution, Solver, relative, solution
from .richardson import LastGood, with_step_size


@dataclass(frozen=True)
class SGDSolver(Solver):
    """``num_steps`` of a torch optimizer on ½ vᵀ A v − bᵀ v.

    Needs: A positive definite, and for ``lr`` what the optimizer needs. Costs: one product a step
    (about ten more once, to estimate λ_max when ``lr`` is left out), the optimizer's state anew in
    every solve. The residual reported is that before the last step, noise included.

    Args:
        num_steps: steps.
        lr: learning rate; None takes 1/λ̂_max by power iteration, right for plain SGD.
        optimizer: the name of a class in ``torch.optim``.
        options: its further options.

    Example:
        >>> import torch
        >>> from torch_bilevel.solvers import Operator, SGDSolver
        >>> A = torch.diag(torch.tensor([1., 2.]))
        >>> solver = SGDSolver(num_steps=80, lr=0.3, options={"momentum": 0.3})
        >>> solver.solve(Operator(A.mv, 2), torch.tensor([1., 1.])).value
        tensor([1.0000, 0.5000])
    """

    num_steps: int = 10
    lr: float | None = None
    optimizer: str = "SGD"
    options: Mapping[str, Any] | None = field(default=None, hash=False)

    name: ClassVar[str] = "sgd"
    stochastic: ClassVar[bool] = True
    pure: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.positive_int("SGDSolver", "num_steps", self.num_steps)
        _checks.real("SGDSolver", "lr", self.lr, positive=True, optional=True)
        kind = getattr(torch.optim, str(self.optimizer), None)
        if (
            not isinstance(kind, type)
            or not issubclass(kind, torch.optim.Optimizer)
            or kind is torch.optim.LBFGS
        ):
            raise UnknownName(
                f"SGDSolver(optimizer={self.optimizer!r}): write the name of a class in "
                "torch.optim that steps without a closure, such as 'SGD' or 'Adam'."
            )
        known = inspect.signature(kind).parameters.keys() - {"params", "lr"}
        for option in self.options or {}:
            if option not in known:
                raise UnknownName(
                    f"SGDSolver(options={dict(self.options or {})}): torch.optim."
                    f"{self.optimizer} has no further option {option!r} (lr has its own place). "
                    f"{suggest(option, known)}"
                )

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`; ``x0`` is used as it is, for noise hides which start is closer."""

        def run(eta: Tensor) -> Solution:
            v = torch.zeros_like(b)
            if x0 is not None:
                v = torch.where(torch.dot(b, b) > 0, x0, v)
            kind = getattr(torch.optim, self.optimizer)
            descent = kind([v], lr=float(eta), **(self.options or {}))
            good = LastGood(b, eta * b)
            r = b
            for k in range(self.num_steps):
                Av = operator.draw(k)(v)
                r = b - Av
                good.note(v, r, v, Av)
                v.grad = -r
                descent.step()
            diverged = good.grown(r, 100)
            return solution(
                good.unless(diverged, v),
                relative(r, b),
                num_steps=torch.tensor(self.num_steps, device=b.device),
                curvature=good.curvature,
                diverged=diverged,
            )

        plain = self.optimizer == "SGD" and not self.options
        limit = 1.0 if plain else None  # that of others is not known
        return with_step_size(run, operator, b, self.lr, memory, limit)
