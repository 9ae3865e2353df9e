"""The update of ``torch.optim.NAdam``, with weight decay of both kinds, maximize.

    g ← ±g + wd·y                 (L2)        y ← (1 − lr·wd)·y      (decoupled)
    m ← β₁ m + (1 − β₁) g;        v ← β₂ v + (1 − β₂) g²
    μₜ = β₁ (1 − ½·0.96^(t·ψ));   Πₜ = Πₜ₋₁ μₜ           (ψ is ``momentum_decay``)
    y ← y − lr [ (1 − μₜ)/(1 − Πₜ) · g + μₜ₊₁/(1 − Πₜ μₜ₊₁) · m ] / (√(v/(1 − β₂ᵗ)) + ε)

At v = 0 (a coordinate that never had a gradient) √v has no finite derivative; g and m are zero
there too, and the derivative of m/(√v + ε) is that of m/ε.

It stands still where Adam does: with m → g, Π → 0 and μₜ₊₁ − μₜ → 0 the bracket tends to g.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .adam import adam_stationarity
from .arithmetic import Scalar, addcdiv, addcmul, decayed, exact, lerp, number, root
from .rule import Hyper, State, UpdateRule


def nadam(
    parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper
) -> tuple[Tensor, State]:
    """One NAdam step; see the module's formula.

    Args:
        parameter: y_k.
        gradient: the gradient the step consumes.
        state: ``step``, ``mu_product``, ``exp_avg``, ``exp_avg_sq``, or nothing.
        hyper: the options of ``torch.optim.NAdam``.

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
    mu, mu_next = (_mu(t, beta1, hyper) for t in (step, step + 1))
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # as torch
    product = state.get("mu_product", torch.ones((), dtype=dtype)) * mu
    state = {
        **state,
        "step": step,
        "mu_product": product,
        "exp_avg": m,
        "exp_avg_sq": v,
    }
    product = exact(product)
    denominator = root(v / (1 - beta2**step)) + hyper["eps"]
    of_g = number(-lr * (1 - mu) / (1 - product))
    of_m = number(-lr * mu_next / (1 - product * mu_next))
    y = addcdiv(parameter, g, denominator, value=of_g)
    return addcdiv(y, m, denominator, value=of_m), state


def _mu(step: float, beta1: Scalar, hyper: Hyper) -> Scalar:
    return beta1 * (1 - 0.5 * 0.96 ** (step * number(hyper["momentum_decay"])))


NADAM = UpdateRule(torch.optim.NAdam, nadam, adam_stationarity)
