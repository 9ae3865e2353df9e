"""The update of ``torch.optim.RAdam``, with weight decay of both kinds, maximize.

    g ← ±g + wd·y                 (L2)        y ← (1 − lr·wd)·y      (decoupled)
    m ← β₁ m + (1 − β₁) g;        v ← β₂ v + (1 − β₂) g²;      m̂ = m/(1 − β₁ᵗ)
    ρ∞ = 2/(1 − β₂) − 1;          ρₜ = ρ∞ − 2t β₂ᵗ/(1 − β₂ᵗ)
    r = √[ (ρₜ − 4)(ρₜ − 2) ρ∞ / ((ρ∞ − 4)(ρ∞ − 2) ρₜ) ]
    y ← y − lr·r·m̂ √(1 − β₂ᵗ)/(√v + ε)  where ρₜ > 5,      y ← y − lr·m̂  before

The switch is a constant of the derivative. At v = 0 (a coordinate that never had a gradient) √v
has no finite derivative; m is zero there too, and the derivative of m/(√v + ε) is that of m/ε.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import Scalar, addcmul, decayed, is_on, lerp, number, root
from .rule import Hyper, State, Stationarity, UpdateRule, l2_stationarity


def radam(
    parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper
) -> tuple[Tensor, State]:
    """One RAdam step; see the module's formula.

    Args:
        parameter: y_k.
        gradient: the gradient the step consumes.
        state: ``step``, ``exp_avg``, ``exp_avg_sq``, or nothing.
        hyper: the options of ``torch.optim.RAdam``.

    Returns:
        y_{k+1} and the next state.
    """
    lr = hyper["lr"]
    beta1, beta2 = (number(beta) for beta in hyper["betas"])
    step = float(state.get("step", 0.0)) + 1
    zero = torch.zeros_like(parameter)
    parameter, g = decayed(parameter, gradient, hyper)
    m = lerp(state.get("exp_avg", zero), g, 1 - beta1)
    v = addcmul(state.get("exp_avg_sq", zero) * beta2, g, g, value=1 - beta2)
    state = {**state, "step": step, "exp_avg": m, "exp_avg_sq": v}
    # torch multiplies tensors here instead of taking the factor as a number
    update = m / (1 - beta1**step) * lr
    r = _rectification(beta2, step)
    if r is not None:
        update = update * ((1 - beta2**step) ** 0.5 / (root(v) + hyper["eps"])) * r
    # a 0-d parameter is not to take the dtype of a tensor lr
    return (parameter - update).to(parameter.dtype), state


def _rectification(beta2: Scalar, step: float) -> Scalar | None:
    """Return r, or None where the step is not rectified (ρₜ ≤ 5)."""
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * step * beta2**step / (1 - beta2**step)
    if not rho > 5:
        return None
    return ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5


def radam_stationarity(
    parameter: Tensor, gradient: Tensor | None, state: State, hyper: Hyper
) -> Stationarity:
    """Where RAdam stands still.

    L2 decay: ±∇_y g + wd·y = 0, whatever the preconditioner. Decoupled decay, with m̂ → ∇_y g:
    ±∇_y g + wd·D y = 0 with D = (√v + ε)/(r √(1 − β₂ᵗ)) of the present state, held fixed, and
    D = 1 as long as steps are not rectified.
    """
    found = l2_stationarity(parameter, gradient, state, hyper)
    if not is_on(found.decay) or not hyper["decoupled_weight_decay"]:
        return found
    step, beta2 = float(state.get("step", 0.0)), number(hyper["betas"][1])
    r = _rectification(beta2, step) if step else None
    if r is None:
        return found._replace(frozen=True)
    D = (state["exp_avg_sq"].sqrt() + hyper["eps"]) / (r * (1 - beta2**step) ** 0.5)
    return found._replace(decay=found.decay * D, frozen=True)


RADAM = UpdateRule(torch.optim.RAdam, radam, radam_stationarity)
