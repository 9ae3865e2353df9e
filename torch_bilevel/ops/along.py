"""The loss of linear outputs and its products along a direction known in advance.

As the functions of `linear_loss`, for W, b and ω: the loss, its gradient and H v come from one
visit to x, before the gradient is asked for. See `foresee`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..errors import NoThirdDerivative
from ..kernels.one_pass import Direction
from .foresee import same
from .formulas import Terms, joint, second, times, values
from .link import Link


class _LossAlong(Function):
    """(W, b, ω) ↦ S with s = 1."""

    @staticmethod
    def forward(
        ctx: Any, weight: Any, bias: Any, omega: Any, x: Any, target: Any, share: Any,
        dW: Any, db: Any, link: Any,
    ) -> Any:  # fmt: skip
        terms = Terms(link, x, weight, bias, target, share, omega)
        found = joint(terms, Direction(dW, db))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            weight, bias, omega, x, target, share, dW, db, found.losses, found.slopes,
            *found.gradient, *found.product,
        )  # fmt: skip
        ctx.link = link
        return found.loss

    @staticmethod
    def backward(ctx: Any, seed: Any) -> Any:  # type: ignore[override]
        if seed is None:
            return (None,) * 9
        found = _GradientAlong.apply(*ctx.saved_tensors, seed, ctx.link)
        return *found, *(None,) * 6


class _GradientAlong(Function):
    """(W, b, ω, s) ↦ ∂S/∂(W, b, ω), all of which is known but for the factor s."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *saved, seed, link = inputs
        omega, share, losses, gW, gb = (saved[k] for k in (2, 5, 8, 10, 11))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved, seed)
        ctx.link = link
        to_omega = None if omega is None else times(seed, share) * losses
        return seed * gW, None if gb is None else seed * gb, to_omega

    @staticmethod
    def backward(ctx: Any, vW: Any, vb: Any, vω: Any) -> Any:  # type: ignore[override]
        *saved, seed = ctx.saved_tensors
        weight, bias, omega, x, target, share, dW, db, _, slopes, _, _, hW, hb = saved
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            raise NoThirdDerivative(
                "torch_bilevel.ops were differentiated three times, in a single-loop estimator. "
                "Write the loss with torch.nn.functional instead."
            )
        if vω is None and same(vW, dW) and same(vb, db):
            cW, cb = seed * hW, None if hb is None else seed * hb
            cω = times(seed, share) * slopes if needs[2] else None
            # ∂_s ⟨s ∇S, v⟩ = Σ κ ω∘⟨r, u⟩
            cs = times(times(slopes, share), omega).sum() if needs[14] else None
        else:
            terms = Terms(ctx.link, x, weight, bias, target, share, omega)
            losses, state = values(terms)
            terms = terms._replace(losses=losses, state=state)
            wanted = (False, needs[0], needs[1], False, needs[2], needs[14])
            _, cW, cb, _, cω, cs = second(terms, seed, (None, vW, vb, None, vω), wanted)
        return cW, cb, cω, *(None,) * 11, cs, None


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
