"""The update of ``torch.optim.Rprop``, with maximize.

    s ← clamp(s · (η₊ where g·g₋ > 0, η₋ where g·g₋ < 0, else 1))      (s = lr at first)
    g ← 0 where g·g₋ < 0;   y ← y − s·sign(g);   g₋ ← g                (g₋ is ``prev``)

The gradient enters through signs alone: the derivative with respect to it is zero away from
ties, and an unrolled hypergradient is what the outer variables do directly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import number
from .rule import Hyper, State, UpdateRule, l2_stationarity


def rprop(
    parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper
) -> tuple[Tensor, State]:
    """One Rprop step; see the module's formula.

    Args:
        parameter: y_k.
        gradient: the gradient the step consumes.
        state: ``step``, ``prev``, ``step_size``, or nothing.
        hyper: the options of ``torch.optim.Rprop``.

    Returns:
        y_{k+1} and the next state.
    """
    eta_minus, eta_plus = (number(eta) for eta in hyper["etas"])
    smallest, largest = (float(bound) for bound in hyper["step_sizes"])
    one = torch.ones_like(parameter)
    g = -gradient if hyper["maximize"] else gradient
    agreement = (g * state.get("prev", torch.zeros_like(g))).detach()
    size = state.get("step_size")
    size = one * number(hyper["lr"]) if size is None else size
    factor = torch.where(agreement < 0, one * eta_minus, one)
    factor = torch.where(agreement > 0, one * eta_plus, factor)
    size = (size * factor).clamp(smallest, largest)
    g = torch.where(agreement < 0, torch.zeros_like(g), g)
    step = float(state.get("step", 0.0)) + 1
    state = {**state, "step": step, "prev": g, "step_size": size}
    return torch.addcmul(parameter, g.sign(), size, value=-1), state


RPROP = UpdateRule(torch.optim.Rprop, rprop, l2_stationarity)
