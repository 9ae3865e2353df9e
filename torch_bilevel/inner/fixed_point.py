"""The optimizer of an inner problem that is a fixed point, y = Ψ(y, x).

y ← y − η (y − Ψ(y, x)),  the residual y − Ψ(y, x) standing in ``.grad``
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .arithmetic import add, number
from .rule import Hyper, State, UpdateRule, l2_stationarity


class FixedPointIteration(torch.optim.Optimizer):
    """Applies a registered map: y ← (1 − η) y + η Ψ(y, x).

    To be given as ``inner`` to a `BilevelOptimizer` whose `fixed_point_map` is registered; its
    ``step()``, or that of the bilevel optimizer, applies the map.

    Args:
        params: y, in the order in which the map returns them.
        damping: η; 1 is the plain iteration. It is the ``lr`` of the parameter groups, so that
            schedulers change it.

    Raises:
        ValueError: ``damping`` is not positive.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> y, x = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> optimizer = tb.BilevelOptimizer(
        ...     tb.FixedPointIteration([y]), torch.optim.SGD([x], lr=0.1), estimator="gmres")
        >>> half = optimizer.fixed_point_map(lambda: (y + x) / 2)         # y* = x
        >>> valid = optimizer.outer_loss(lambda: ((y - 3) ** 2).sum())
        >>> for _ in range(30):
        ...     _ = optimizer.step()
        >>> valid().backward()
        >>> round(float(x.grad), 3)                                     # 2 (x − 3)
        -4.0
    """

    def __init__(self, params: Iterable[Any], damping: float = 1.0):
        _checks.real("FixedPointIteration", "damping", damping, positive=True)
        super().__init__(params, {"lr": damping})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a residual in ``.grad`` by η of it."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * group["lr"])
        return result


def iteration(
    parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper
) -> tuple[Tensor, State]:
    """One damped application; see the module's formula.

    Args:
        parameter: y_k.
        gradient: the residual y_k − Ψ(y_k, x).
        state: nothing.
        hyper: ``lr`` is η.

    Returns:
        y_{k+1} and the state.
    """
    return add(parameter, gradient * -number(hyper["lr"]), alpha=1), state


FIXED_POINT = UpdateRule(FixedPointIteration, iteration, l2_stationarity)
