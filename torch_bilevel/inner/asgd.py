"""The update of ``torch.optim.ASGD`` (averaged SGD), with weight decay, maximize.

g ← ±g + wd·y;                  y ← (1 − λη)·y − η·g        (λ is ``lambd``)
ȳ ← ȳ + μ (y − ȳ)               the average, ``ax``; no step reads it
η ← lr/(1 + λ·lr·t)^α;          μ ← 1/max(1, t − t₀)        (η = lr, μ = 1 at first)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import add, decayed, exact, number
from .rule import Hyper, State, Stationarity, UpdateRule, l2_stationarity


def asgd(
    parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper
) -> tuple[Tensor, State]:
    """One ASGD step; see the module's formula.

    Args:
        parameter: y_k.
        gradient: the gradient the step consumes.
        state: ``step``, ``eta``, ``mu``, ``ax``, or nothing.
        hyper: the options of ``torch.optim.ASGD``.

    Returns:
        y_{k+1} and the next state.
    """
    lr = hyper["lr"]  # a tensor stays one, for torch raises it to the power as a tensor
    lambd = number(hyper["lambd"])
    step = float(state.get("step", 0.0)) + 1
    eta = state.get("eta", _scalar(lr, parameter))
    mu = state.get("mu", _scalar(1.0, parameter))
    parameter, g = decayed(parameter, gradient, hyper)
    rate = exact(eta)
    y = add(parameter * (1 - lambd * rate), g, alpha=-rate)
    ax = state.get("ax")
    if ax is None or float(mu.detach()) == 1:
        ax = y
    else:
        ax = ax + ((y - ax) * mu).to(ax.dtype)  # 0-d tensors would promote
    eta = torch.as_tensor(lr / (1 + lambd * lr * step) ** number(hyper["alpha"])).to(
        eta
    )
    mu = torch.full_like(mu, 1 / max(1, step - hyper["t0"]))
    return y, {**state, "step": step, "eta": eta, "mu": mu, "ax": ax}


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A 0-d tensor of the dtype torch keeps scalars of optimizer state in."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return torch.as_tensor(value, dtype=dtype, device=like.device)


def asgd_stationarity(
    parameter: Tensor, gradient: Tensor | None, state: State, hyper: Hyper
) -> Stationarity:
    """Both decays act as an L2 penalty: ±∇_y g + (wd + λ)·y = 0."""
    found = l2_stationarity(parameter, gradient, state, hyper)
    return found._replace(decay=found.decay + number(hyper["lambd"]))


ASGD = UpdateRule(torch.optim.ASGD, asgd, asgd_stationarity)
