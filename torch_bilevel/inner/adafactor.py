"""The update of ``torch.optim.Adafactor``, with decoupled weight decay, maximize.

    ρ = min(lr, 1/√t);   α = max(ε₂, RMS(y)) ρ;   y ← (1 − lr·wd)·y;   1 − β = t^κ
    R ← β R + (1 − β) mean_columns g²;   C ← β C + (1 − β) mean_rows g²      (of a matrix)
    V = R C / max(mean R, ε₁);           V ← β V + (1 − β) g²                (of a vector)
    u = g/√max(V, ε₁²);                  y ← y − α u / max(1, RMS(u)/d)

κ is ``beta2_decay``. Every maximum is differentiated on the side it takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import Scalar, add, is_on, lerp, may_be_differentiated, number, root
from .rule import Hyper, State, UpdateRule, without_decay


def adafactor(
    parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper
) -> tuple[Tensor, State]:
    """One Adafactor step; see the module's formula.

    Args:
        parameter: y_k.
        gradient: the gradient the step consumes.
        state: ``step``, with ``row_var`` and ``col_var`` or ``variance``, or nothing.
        hyper: the options of ``torch.optim.Adafactor``.

    Returns:
        y_{k+1} and the next state.
    """
    lr = hyper["lr"]  # a float32 tensor stays one, for torch rounds in it too
    decay, (eps1, eps2) = number(hyper["weight_decay"]), hyper["eps"]
    if eps1 is None:
        eps1 = torch.finfo(parameter.dtype).eps
    step = float(state.get("step", 0.0)) + 1
    g = -gradient if hyper["maximize"] else gradient
    alpha = at_least(eps2, rms(parameter)) * at_most(1 / step**0.5, lr)
    if is_on(decay):
        parameter = parameter * number(1 - lr * decay)
    new, state = step ** hyper["beta2_decay"], {**state, "step": step}
    if g.dim() > 1:
        means = mean_square(g, -1), mean_square(g, -2)
        for key, mean in zip(("row_var", "col_var"), means, strict=True):
            state[key] = lerp(state.get(key, torch.zeros_like(mean)), mean, new)
        V = state["row_var"] @ state["col_var"]
        V = V / state["row_var"].mean(dim=-2, keepdim=True).clamp(min=eps1)
    else:
        V = state["variance"] = lerp(
            state.get("variance", torch.zeros_like(g)), g * g, new
        )
    update = V.clamp(min=eps1 * eps1).rsqrt() * g
    divisor = at_least(1.0, rms(update, hyper["d"]))
    return add(parameter, update, alpha=number(-alpha / divisor)), state


def rms(x: Tensor, scale: float = 1.0) -> Scalar:
    """√(mean x²)/scale, with derivative 0 at 0; a number unless it may be differentiated."""
    if may_be_differentiated(x):
        return root((x * x).mean()) / scale
    return float(x.norm(2)) / (x.numel() ** 0.5 * scale)


def mean_square(g: Tensor, dim: int) -> Tensor:
    """The mean of g² along an axis, which stays."""
    if may_be_differentiated(g):
        return (g * g).mean(dim, keepdim=True)
    return torch.norm(g, dim=dim, keepdim=True).square_().div_(g.size(dim))


def at_least(floor: float, value: Scalar) -> Scalar:
    """The larger of the two."""
    return value.clamp(min=floor) if isinstance(value, Tensor) else max(floor, value)


def at_most(cap: float, value: Scalar) -> Scalar:
    """The smaller of the two."""
    return value.clamp(max=cap) if isinstance(value, Tensor) else min(cap, value)


ADAFACTOR = UpdateRule(
    torch.optim.Adafactor,
    adafactor,
    without_decay("Adafactor", "the scaled and clipped gradient balances the decay"),
    elementwise=False,
)
