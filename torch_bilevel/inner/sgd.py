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


def sgd_transpose(
    point: tuple[Tensor, Tensor, State],
    after: State,
    hyper: Hyper,
    y_bar: Tensor,
    g_bar: Tensor,
    state_bar: State,
) -> None:
    """The transposed derivative of `sgd`; see `UpdateRule.transpose`.

    With u what y moves along:  ū = −lr·ȳ;   b̄ ← b̄ + (m·ū with Nesterov, else ū);
    ḡ = (ū with Nesterov) + (1 − d)·b̄ (b̄ at the first step);   b̄ ← m·b̄;   ȳ ← ȳ + wd·ḡ
    """
    lr, momentum, decay = (
        float(hyper[key]) for key in ("lr", "momentum", "weight_decay")
    )
    if momentum:
        bar, nesterov = state_bar["momentum_buffer"], hyper["nesterov"]
        bar.add_(y_bar, alpha=-lr * momentum if nesterov else -lr)
        first = "momentum_buffer" not in point[2]
        share = 1.0 if first else 1.0 - float(hyper["dampening"])
        torch.mul(bar, share, out=g_bar)
        if nesterov:
            g_bar.add_(y_bar, alpha=-lr)
        bar.mul_(momentum)
    else:
        torch.mul(y_bar, -lr, out=g_bar)
    if decay:
        y_bar.add_(g_bar, alpha=decay)
    if hyper["maximize"]:
        g_bar.neg_()


SGD = UpdateRule(torch.optim.SGD, sgd, l2_stationarity, transpose=sgd_transpose)
