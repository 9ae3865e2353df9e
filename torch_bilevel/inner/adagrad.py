"""The update of ``torch.optim.Adagrad``, with lr decay, weight decay, maximize.

    g ← ±g + wd·y;   v ← v + g²   (from ``initial_accumulator_value``)
    y ← y − lr/(1 + (t − 1)·lr_decay) · g / (√v + ε)

At v = 0 (a coordinate that never had a gradient) √v has no finite derivative; g is zero there
too, and the derivative of g/(√v + ε) is that of g/ε.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import addcdiv, addcmul, decayed, number, root
from .rule import Hyper, State, UpdateRule, l2_stationarity


def adagrad(
    parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper
) -> tuple[Tensor, State]:
    """One Adagrad step; see the module's formula.

    Args:
        parameter: y_k.
        gradient: the gradient the step consumes.
        state: ``step`` and ``sum``, or nothing (a parameter added after construction).
        hyper: the options of ``torch.optim.Adagrad``.

    Returns:
        y_{k+1} and the next state.
    """
    lr = hyper["lr"]  # a float32 tensor stays one, for torch rounds in it too
    before = float(state.get("step", 0.0))
    parameter, g = decayed(parameter, gradient, hyper)
    v = state.get("sum")
    if v is None:
        v = torch.full_like(parameter, hyper["initial_accumulator_value"])
    v = addcmul(v, g, g, value=1)
    step_size = number(lr / (1 + before * number(hyper["lr_decay"])))
    y = addcdiv(parameter, g, root(v) + hyper["eps"], value=-step_size)
    return y, {**state, "step": before + 1, "sum": v}


ADAGRAD = UpdateRule(torch.optim.Adagrad, adagrad, l2_stationarity)


def fresh_state(optimizer: torch.optim.Optimizer) -> dict[Tensor, State]:
    """The state of an optimizer that has not stepped.

    Empty, but for Adagrad, which is the only one in ``torch.optim`` that fills its state when it
    is constructed and cannot step without.

    Args:
        optimizer: any optimizer.

    Returns:
        Parameter → state.
    """
    if not isinstance(optimizer, torch.optim.Adagrad):
        return {}
    return {
        p: {
            "step": torch.tensor(0.0, device=p.device if group.get("fused") else "cpu"),
            "sum": torch.full_like(
                p, group["initial_accumulator_value"], requires_grad=False
            ),
        }
        for group in optimizer.param_groups
        for p in group["params"]
    }
