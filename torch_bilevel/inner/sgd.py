"""The update of ``torch.optim.SGD``, with momentum, dampening, Nesterov, weight decay, maximize.

g ← ±g + wd·y;   b ← m·b + (1 − d)·g  (b = g at the first step);   g ← g + m·b or b
y ← y − lr·g
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import add, decayed, is_on, number
from .rule import Hyper, State, UpdateRule, l2_stationarity


def sgd(
    parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper
) -> tuple[Tensor, State]:
    """One SGD step; see the module's formula.

    Args:
        parameter: y_k.
        gradient: the gradient the step consumes.
        state: ``momentum_buffer`` or nothing.
        hyper: the options of ``torch.optim.SGD``.

    Returns:
        y_{k+1} and the next state.
    """
    momentum = number(hyper["momentum"])
    parameter, g = decayed(parameter, gradient, hyper)
    if is_on(momentum):
        buffer = state.get("momentum_buffer")
        # torch detaches its first buffer even when asked to be differentiable; this one is g.
        buffer = (
            g
            if buffer is None
            else add(buffer * momentum, g, alpha=1 - number(hyper["dampening"]))
        )
        state = {**state, "momentum_buffer": buffer}
        g = add(g, buffer, alpha=momentum) if hyper["nesterov"] else buffer
    return add(parameter, g, alpha=-number(hyper["lr"])), state


SGD = UpdateRule(torch.optim.SGD, sgd, l2_stationarity)
