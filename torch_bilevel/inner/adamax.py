"""The update of ``torch.optim.Adamax``, with weight decay, maximize.

    g ← ±g + wd·y;   m ← β₁ m + (1 − β₁) g;   u ← max(β₂ u, |g| + ε)
    y ← y − lr/(1 − β₁ᵗ) · m / u

The maximum is differentiated away from ties, |g| at 0 as 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import addcdiv, decayed, lerp, number
from .rule import Hyper, State, UpdateRule, l2_stationarity


def adamax(
    parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper
) -> tuple[Tensor, State]:
    """One Adamax step; see the module's formula.

    Args:
        parameter: y_k.
        gradient: the gradient the step consumes.
        state: ``step``, ``exp_avg``, ``exp_inf``, or nothing.
        hyper: the options of ``torch.optim.Adamax``.

    Returns:
        y_{k+1} and the next state.
    """
    lr = hyper["lr"]  # a float32 tensor stays one, for torch rounds in it too
    beta1, beta2 = (number(beta) for beta in hyper["betas"])
    step = float(state.get("step", 0.0)) + 1
    zero = torch.zeros_like(parameter)
    parameter, g = decayed(parameter, gradient, hyper)
    m = lerp(state.get("exp_avg", zero), g, 1 - beta1)
    u = torch.maximum(state.get("exp_inf", zero) * beta2, g.abs() + hyper["eps"])
    state = {**state, "step": step, "exp_avg": m, "exp_inf": u}
    step_size = number(lr / (1 - beta1**step))
    return addcdiv(parameter, m, u, value=-step_size), state


ADAMAX = UpdateRule(torch.optim.Adamax, adamax, l2_stationarity)
