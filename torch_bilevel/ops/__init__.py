"""Losses of linear outputs as one twice differentiable operation each.

A user swaps ``F.cross_entropy(F.linear(x, weight, bias), target)`` for one call, and every product
with a Hessian becomes two matrix products with the rows of x, its cross-derivative with the
weights of the examples included. The formulas stand in `linear_loss`.

>>> import torch
>>> from torch_bilevel.ops import linear_cross_entropy
>>> x, target = torch.eye(2), torch.tensor([0, 1])
>>> W = torch.zeros(2, 2, requires_grad=True)
>>> linear_cross_entropy(x, W, None, target)            # log 2
tensor(0.6931, grad_fn=...)
"""

from .cut import always_fused as always_fused
from .cut import cut_by as cut_by
from .cut import model_output as model_output
from .foresee import foreseen as foreseen
from .fused import choices as choices
from .heads import solve_linear_heads as solve_linear_heads
from .linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from .linear_logistic import linear_logistic as linear_logistic
from .linear_squared_error import linear_squared_error as linear_squared_error

__all__ = [
    "linear_cross_entropy",
    "linear_logistic",
    "linear_squared_error",
    "solve_linear_heads",
]
