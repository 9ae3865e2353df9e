"""The update of ``torch.optim.RMSprop``, with centering, momentum, weight decay, maximize.

    g ← ±g + wd·y;   v ← α v + (1 − α) g²;   ḡ ← α ḡ + (1 − α) g with centered
    d ← g / (√v + ε)  or  g / (√(v − ḡ²) + ε) with centered
    y ← y − lr·d,    with momentum  b ← m·b + d;   y ← y − lr·b

At v = 0 (a coordinate that never had a gradient) √v has no finite derivative; g is zero there
too, and the derivative of g/(√v + ε) is that of g/ε.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import add, addcdiv, addcmul, decayed, is_on, lerp, number, root
from .rule import Hyper, State, UpdateRule, l2_stationarity


def rmsprop(
    parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper
) -> tuple[Tensor, State]:
    """One RMSprop step; see the module's formula.

    Args:
        parameter: y_k.
        gradient: the gradient the step consumes.
        state: ``step``, ``square_avg``, ``grad_avg``, ``momentum_buffer``, or nothing.
        hyper: the options of ``torch.optim.RMSprop``.

    Returns:
        y_{k+1} and the next state.
    """
    lr, alpha = number(hyper["lr"]), number(hyper["alpha"])
    momentum = number(hyper["momentum"])
    zero = torch.zeros_like(parameter)
    parameter, g = decayed(parameter, gradient, hyper)
    v = addcmul(state.get("square_avg", zero) * alpha, g, g, value=1 - alpha)
    state = {**state, "step": float(state.get("step", 0.0)) + 1, "square_avg": v}
    if hyper["centered"]:
        mean = lerp(state.get("grad_avg", zero), g, 1 - alpha)
        state["grad_avg"] = mean
        v = addcmul(v, mean, mean, value=-1)
    denominator = root(v) + hyper["eps"]
    if not is_on(momentum):
        return addcdiv(parameter, g, denominator, value=-lr), state
    buffer = state.get("momentum_buffer", zero) * momentum
    buffer = addcdiv(buffer, g, denominator, value=1)
    state["momentum_buffer"] = buffer
    return add(parameter, buffer, alpha=-lr), state


RMSPROP = UpdateRule(torch.optim.RMSprop, rmsprop, l2_stationarity)
