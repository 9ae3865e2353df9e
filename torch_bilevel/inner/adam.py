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


def adam_transpose(
    point: tuple[Tensor, Tensor, State],
    after: State,
    hyper: Hyper,
    y_bar: Tensor,
    g_bar: Tensor,
    state_bar: State,
) -> None:
    """The transposed derivative of `adam`; see `UpdateRule.transpose`.

    With α = lr/(1 − β₁ᵗ), c = √(1 − β₂ᵗ), D = √v/c + ε and m, v after the step:

        t = −α ȳ/D;   m̄ ← m̄ + t;   v̄ ← v̄ − t∘m/(2 c √v D)  (nothing where v = 0)
        ḡ = (1 − β₁) m̄ + 2 (1 − β₂) g∘v̄;   m̄ ← β₁ m̄;   v̄ ← β₂ v̄
        ȳ ← ȳ + wd·ḡ  (L2)  or  (1 − lr·wd) ȳ  (decoupled)

    With amsgrad what goes to v goes to the larger of v̄ and v, half to each where they are equal.
    """
    y, gradient, before = point
    lr, decay = hyper["lr"], float(hyper["weight_decay"])
    beta1, beta2 = map(float, hyper["betas"])
    step, m = after["step"], after["exp_avg"]
    decoupled = hyper.get("decoupled_weight_decay")
    m_bar, v_bar = state_bar["exp_avg"], state_bar["exp_avg_sq"]
    v = after["max_exp_avg_sq"] if hyper["amsgrad"] else after["exp_avg_sq"]
    c = (1 - beta2**step) ** 0.5
    root = v.sqrt()
    D = (root / c).add_(hyper["eps"])
    t = torch.div(y_bar, D, out=g_bar).mul_(-number(lr / (1 - beta1**step)))
    m_bar.add_(t)
    through = t.mul_(m).div_(D).div_(root).mul_(-0.5 / c).masked_fill_(v == 0, 0.0)
    if hyper["amsgrad"]:
        largest = state_bar["max_exp_avg_sq"].add_(through)
        new = after["exp_avg_sq"]
        known = before.get("max_exp_avg_sq")
        known = torch.zeros_like(new) if known is None else known
        share = (known > new).to(v.dtype).add_(known == new, alpha=0.5)
        v_bar.add_(largest).addcmul_(largest, share, value=-1.0)
        largest.mul_(share)
    else:
        v_bar.add_(through)
    _, g = decayed(y, gradient, {**hyper, "weight_decay": 0.0 if decoupled else decay})
    torch.mul(m_bar, 1 - beta1, out=g_bar).addcmul_(g, v_bar, value=2 * (1 - beta2))
    m_bar.mul_(beta1)
    v_bar.mul_(beta2)
    if decoupled:
        y_bar.mul_(number(1 - lr * decay))
    elif decay:
        y_bar.add_(g_bar, alpha=decay)
    if hyper["maximize"]:
        g_bar.neg_()


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


ADAM = UpdateRule(torch.optim.Adam, adam, adam_stationarity, transpose=adam_transpose)
