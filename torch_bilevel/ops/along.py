"""The loss of linear outputs and its products along a direction known in advance.

As the functions of `linear_loss`, for W, b and ω, with x read twice in all. See `foresee`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..errors import NoThirdDerivative
from .foresee import same
from .formulas import (
    Terms,
    gradient_along,
    second,
    slopes,
    values_along,
    weighted_sum,
)
from .link import Link


class _LossAlong(Function):
    """(W, b, ω) ↦ S with s = 1."""

    @staticmethod
    def forward(
        ctx: Any, weight: Any, bias: Any, omega: Any, x: Any, target: Any, share: Any,
        dW: Any, db: Any, link: Any,
    ) -> Any:  # fmt: skip
        terms = Terms(link, x, weight, bias, target, share, omega)
        losses, state, u = values_along(terms, dW, db)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            weight, bias, omega, x, target, share, losses, state, u, dW, db
        )
        ctx.link = link
        return weighted_sum(losses, share, omega)

    @staticmethod
    def backward(ctx: Any, seed: Any) -> Any:  # type: ignore[override]
        if seed is None:
            return (None,) * 9
        found = _GradientAlong.apply(*ctx.saved_tensors, seed, ctx.link)
        return *found, *(None,) * 6


def _terms(link: Link, saved: Any) -> Terms:
    weight, bias, omega, x, target, share, losses, state = saved[:8]
    return Terms(link, x, weight, bias, target, share, omega, losses, state)


class _GradientAlong(Function):
    """(W, b, ω, s) ↦ ∂S/∂(W, b, ω), with H v computed on the way."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *saved, u, dW, db, seed, link = inputs
        wanted = False, True, True, False, saved[2] is not None
        first, (_, hW, hb, _) = gradient_along(_terms(link, saved), seed, u, wanted)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved, u, dW, db, seed, hW, hb)
        ctx.link = link
        _, gW, gb, _, gω = first
        return gW, gb, gω

    @staticmethod
    def backward(ctx: Any, vW: Any, vb: Any, vω: Any) -> Any:  # type: ignore[override]
        *saved, u, dW, db, seed, hW, hb = ctx.saved_tensors
        terms, needs = _terms(ctx.link, saved), ctx.needs_input_grad
        wanted = (False, needs[0], needs[1], False, needs[2], needs[11])
        if torch.is_grad_enabled():
            raise NoThirdDerivative(
                "torch_bilevel.ops were differentiated three times, in a single-loop estimator. "
                "Write the loss with torch.nn.functional instead."
            )
        if vω is None and same(vW, dW) and same(vb, db):
            cW, cb = hW, hb
            cω, cs = slopes(terms, seed, u, wanted)
        else:
            along = None, vW, vb, None, vω
            _, cW, cb, _, cω, cs = second(terms, seed, along, wanted)
        return cW, cb, cω, *(None,) * 8, cs, None


def loss_along(
    link: Link,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    omega: Tensor | None,
    share: Tensor | None,
    along: tuple[Tensor, Tensor | None],
) -> Tensor:
    """Σ κ ω ℓ; see `linear_loss`."""
    return _LossAlong.apply(
        weight, bias, omega, x, target, share, along[0], along[1], link
    )
