"""The update of ``torch.optim.Muon``, the optimizer of matrices, with decoupled weight decay.

    b ← m·b + (1 − m)·g;     u = b,  with nesterov  u = (1 − m)·g + m·b
    X ← u/max(‖u‖, ε);       X ← aX + (bA + cA²)X  with  A = XXᵀ,  ``ns_steps`` times
    y ← (1 − lr·wd)·y − lr·κ·X

κ is what ``adjust_lr_fn`` chooses from the shape. torch iterates in bfloat16, where X is a step
function of u. The value is that one; the derivative is that of the iteration in the precision of
the parameter, from which the rounded X is off by a few hundredths.

Not mirrored: with bfloat16 parameters and without nesterov, torch 2.13 divides the momentum
buffer itself by its norm, for ``bfloat16()`` does not copy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arithmetic import add, is_on, lerp, may_be_differentiated, number
from .rule import Hyper, State, UpdateRule, without_decay


def muon(
    parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper
) -> tuple[Tensor, State]:
    """One Muon step; see the module's formula.

    Args:
        parameter: y_k, a matrix.
        gradient: the gradient the step consumes.
        state: ``momentum_buffer`` or nothing.
        hyper: the options of ``torch.optim.Muon``.

    Returns:
        y_{k+1} and the next state.
    """
    lr = hyper["lr"]  # a float32 tensor stays one, for torch rounds in it too
    momentum, decay = number(hyper["momentum"]), number(hyper["weight_decay"])
    buffer = state.get("momentum_buffer", torch.zeros_like(gradient))
    buffer = lerp(buffer, gradient, 1 - momentum)
    update = lerp(gradient, buffer, momentum) if hyper["nesterov"] else buffer
    options = hyper["ns_coefficients"], hyper["ns_steps"], hyper["eps"]
    rounded = orthogonalized(update.detach().bfloat16(), *options)
    if may_be_differentiated(update):
        exact = orthogonalized(update, *options)
        update = exact + (rounded - exact).detach()
    else:
        update = rounded
    if is_on(decay):
        parameter = parameter * number(1 - lr * decay)
    rate = number(lr * _ratio(hyper["adjust_lr_fn"], *parameter.shape))
    y = add(parameter, update, alpha=-rate)
    return y, {**state, "momentum_buffer": buffer}


def orthogonalized(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """A matrix with its singular values moved towards 1 by the Newton–Schulz iteration.

    Args:
        matrix: of any shape; the zero matrix stays what it is.
        coefficients: a, b, c of the quintic a σ + b σ³ + c σ⁵.
        steps: how often it is applied.
        eps: the norm is taken to be at least this.

    Returns:
        The result, in the precision of the matrix.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    X = matrix.mT if tall else matrix  # so that XXᵀ is the smaller Gram matrix
    X = X / torch.linalg.vector_norm(X).clamp(min=eps)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


def _ratio(rule: str | None, rows: int, columns: int) -> float:
    """κ: spectral norm √(rows/columns), or the RMS of an AdamW step."""
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


MUON = UpdateRule(
    torch.optim.Muon,
    muon,
    without_decay("Muon", "the orthogonalised gradient balances the decay"),
    elementwise=False,
)
