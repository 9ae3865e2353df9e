"""The arithmetic of update rules: torch's own forms, differentiable in hyperparameters too.

``torch.add(y, x, alpha=a)`` and its kin round as ``torch.optim`` does, but take ``a`` as a number.
A hyperparameter that is to be differentiated is a tensor; the formula is then written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..solvers import may_look

Scalar = float | Tensor


def number(value: Scalar) -> Scalar:
    """A hyperparameter as a number, unless it is a tensor that is differentiated."""
    if isinstance(value, Tensor) and (value.dim() or may_be_differentiated(value)):
        return value
    return float(value)


def exact(value: Scalar) -> Scalar:
    """As `number`, where torch keeps a number in a float32 tensor and computes in float64."""
    found = number(value)
    return found.double() if isinstance(found, Tensor) else found


def may_be_differentiated(value: Tensor) -> bool:
    """Whether a tensor has a derivative, or may have one: batched, dual, of a program."""
    return (
        value.requires_grad
        or not may_look()
        or forward_ad.unpack_dual(value).tangent is not None
    )


def is_on(value: Scalar) -> bool:
    """Whether a term with this factor is part of the update: not 0, or differentiated."""
    return isinstance(value, Tensor) or value != 0


def add(y: Tensor, x: Tensor, alpha: Scalar) -> Tensor:
    """Return y + alpha·x."""
    return y + alpha * x if isinstance(alpha, Tensor) else torch.add(y, x, alpha=alpha)


def addcmul(y: Tensor, a: Tensor, b: Tensor, value: Scalar) -> Tensor:
    """Return y + value·a·b."""
    if isinstance(value, Tensor):
        return y + value * a * b
    return torch.addcmul(y, a, b, value=value)


def addcdiv(y: Tensor, a: Tensor, b: Tensor, value: Scalar) -> Tensor:
    """Return y + value·a/b."""
    if isinstance(value, Tensor):
        return y + value * a / b
    return torch.addcdiv(y, a, b, value=value)


def lerp(y: Tensor, x: Tensor, weight: Scalar) -> Tensor:
    """Return y + weight·(x − y)."""
    return torch.lerp(y, x, weight)


def root(v: Tensor) -> Tensor:
    """√v with derivative 0 where v = 0 (a coordinate that never had a gradient)."""
    if not may_be_differentiated(v):
        return v.sqrt()
    zero = v == 0
    return torch.where(zero, v, torch.where(zero, torch.ones_like(v), v).sqrt())


def decayed(
    parameter: Tensor, gradient: Tensor, hyper: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The head of most rules: maximisation and weight decay of both kinds.

    g ← ±g + wd·y,  or  y ← (1 − lr·wd)·y  with ``decoupled_weight_decay``.

    Args:
        parameter: y_k.
        gradient: the gradient the step consumes.
        hyper: ``maximize``, ``weight_decay``, ``lr``, perhaps ``decoupled_weight_decay``.

    Returns:
        y and g.
    """
    decay = number(hyper["weight_decay"])
    g = -gradient if hyper["maximize"] else gradient
    if not is_on(decay):
        return parameter, g
    if hyper.get("decoupled_weight_decay"):
        return parameter * number(1 - hyper["lr"] * decay), g
    return parameter, add(g, parameter, alpha=decay)
