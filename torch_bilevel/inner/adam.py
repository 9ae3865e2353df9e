"""The update of ``torch.optim.Adam``, with weight decay of both kinds, amsgrad, maximize.

    g ← ±g + wd·y                 (L2)        y ← (1 − lr·wd)·y      (decoupled)
    m ← β₁ m + (1 − β₁) g;        v ← β₂ v + (1 − β₂) g²;    v̄ ← max(v̄, v) with amsgrad
    y ← y − lr/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)

At v = 0 (a coordinate that never had a gradient) √v has no finite derivative; m is zero there
too, and the derivative of m/(√v + ε) is that of m/ε.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import addcdiv, addcmul, decayed, is_on, lerp, number, root
from .rule import Hyper, State, Stationarity, UpdateRule, l2_stationarity


def adam(
    parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper
) -> tuple[Tensor, State]:
    """One Adam (or AdamW) step; see the module's formula.

    Args:
        parameter: y_k.
        gradient: the gradient the step consumes.
        state: ``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq``, or nothing.
        hyper: the options of ``torch.optim.Adam``.

    Returns:
        y_{k+1} and the next state.
    """
    lr = hyper["lr"]  # a float32 tensor stays one, for torch rounds in it too
    beta1, beta2 = (number(beta) for beta in hyper["betas"])
    step = float(state.get("step", 0.0)) + 1
    zero = torch.zeros_like(parameter)
    parameter, g = decayed(parameter, gradient, hyper)
    m = lerp(state.get("exp_avg", zero), g, 1 - beta1)
    v = addcmul(state.get("exp_avg_sq", zero) * beta2, g, g, value=1 - beta2)
    state = {**state, "step": step, "exp_avg": m, "exp_avg_sq": v}
    if hyper["amsgrad"]:
        v = torch.maximum(state.get("max_exp_avg_sq", zero), v)
        state["max_exp_avg_sq"] = v
    denominator = root(v) / (1 - beta2**step) ** 0.5 + hyper["eps"]
    step_size = number(lr / (1 - beta1**step))
    return addcdiv(parameter, m, denominator, value=-step_size), state


def adam_stationarity(
    parameter: Tensor, gradient: Tensor | None, state: State, hyper: Hyper
) -> Stationarity:
    """Where Adam stands still.

    L2 decay: ±∇_y g + wd·y = 0, whatever the preconditioner. Decoupled decay:
    m̂/(√v̂ + ε) + wd·y = 0 with m̂ → ∇_y g, that is ±∇_y g + wd·D y = 0 with D = √v̂ + ε
    of the present state, held fixed.
    """
    decay = number(hyper["weight_decay"])
    if not is_on(decay) or not hyper.get("decoupled_weight_decay"):
        return l2_stationarity(parameter, gradient, state, hyper)
    step = float(state.get("step", 0.0))
    v = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if v is None or step == 0:
        return Stationarity(-1.0 if hyper["maximize"] else 1.0, 0.0, frozen=True)
    D = v.sqrt() / (1 - number(hyper["betas"][1]) ** step) ** 0.5 + hyper["eps"]
    return Stationarity(-1.0 if hyper["maximize"] else 1.0, decay * D, frozen=True)


ADAM = UpdateRule(torch.optim.Adam, adam, adam_stationarity)
