"""The update of ``torch.optim.Adadelta``, with weight decay, maximize.

g ← ±g + wd·y;   v ← ρ v + (1 − ρ) g²;   d ← √(u + ε)/√(v + ε) · g
u ← ρ u + (1 − ρ) d²;   y ← y − lr·d
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import add, addcmul, decayed, number, root
from .rule import Hyper, State, UpdateRule, l2_stationarity


def adadelta(
    parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper
) -> tuple[Tensor, State]:
    """One Adadelta step; see the module's formula.

    Args:
        parameter: y_k.
        gradient: the gradient the step consumes.
        state: ``step``, ``square_avg``, ``acc_delta``, or nothing.
        hyper: the options of ``torch.optim.Adadelta``.

    Returns:
        y_{k+1} and the next state.
    """
    rho, eps = number(hyper["rho"]), hyper["eps"]
    zero = torch.zeros_like(parameter)
    parameter, g = decayed(parameter, gradient, hyper)
    v = addcmul(state.get("square_avg", zero) * rho, g, g, value=1 - rho)
    u = state.get("acc_delta", zero)
    d = root(u + eps) / root(v + eps) * g  # ε may be 0
    u = addcmul(u * rho, d, d, value=1 - rho)
    step = float(state.get("step", 0.0)) + 1
    state = {**state, "step": step, "square_avg": v, "acc_delta": u}
    return add(parameter, d, alpha=-number(hyper["lr"])), state


ADADELTA = UpdateRule(torch.optim.Adadelta, adadelta, l2_stationarity)
