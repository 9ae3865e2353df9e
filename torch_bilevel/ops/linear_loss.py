"""The loss of linear outputs as an autograd function with two derivatives.

Three functions, each the derivative of the one before: S, its gradient, and the derivative of the
gradient along a direction, which is linear in the direction and no further differentiable. What
they compute stands in `formulas`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._transforms import transformed
from ..errors import NoThirdDerivative
from .formulas import (
    Parts,
    Terms,
    gradient,
    plus,
    second,
    times,
    values,
    weighted_sum,
)
from .link import Link


def _as(parts: Parts, likes: Any) -> Parts:
    """In the dtypes of what they are derivatives of."""
    return tuple(
        part
        if part is None or like is None or part.dtype is like.dtype
        else part.to(like.dtype)
        for part, like in zip(parts, likes, strict=True)
    )


class _Loss(Function):
    """(x, W, b, t, ω) ↦ S with s = 1, or κ ω∘ℓ without the sum."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Any, weight: Any, bias: Any, target: Any, omega: Any, share: Any, link: Any,
        summed: Any,
    ) -> Any:  # fmt: skip
        losses, state = values(Terms(link, x, weight, bias, target, share, omega))
        if not summed:
            return times(times(losses.clone(), share), omega), losses, state
        return weighted_sum(losses, share, omega), losses, state

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *given, ctx.link, _ = inputs
        _, losses, state = output
        ctx.mark_non_differentiable(*(t for t in (losses, state) if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, losses, state)
        ctx.wanted = ctx.needs_input_grad[:5]

    @staticmethod
    def backward(ctx: Any, seed: Any, *_: Any) -> Any:  # type: ignore[override]
        if seed is None:
            return (None,) * 8
        x, weight, bias, target, omega, share, losses, state = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = _gradient(
                x, weight, bias, target, omega, seed, share, losses, state, ctx.link,
                ctx.wanted,
            )  # fmt: skip
            return *found, None, None, None
        terms = Terms(ctx.link, x, weight, bias, target, share, omega, losses, state)
        found = gradient(terms, seed, ctx.wanted)
        return *_as(found, (x, weight, bias, target, omega)), None, None, None


class _Gradient(Function):
    """(x, W, b, t, ω, s) ↦ ∂S/∂(x, W, b, t, ω)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Any, weight: Any, bias: Any, target: Any, omega: Any, seed: Any, share: Any,
        losses: Any, state: Any, link: Any, wanted: Any,
    ) -> Any:  # fmt: skip
        terms = Terms(link, x, weight, bias, target, share, omega, losses, state)
        return _as(gradient(terms, seed, wanted), (x, weight, bias, target, omega))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *given, ctx.link, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        ctx.wanted = ctx.needs_input_grad[:6]

    @staticmethod
    def backward(ctx: Any, *along: Any) -> Any:
        none = (None,) * 5
        saved = ctx.saved_tensors
        if all(part is None for part in along):
            return *none, None, *none
        if torch.is_grad_enabled():
            guarded = _no_third(*saved[:6])
            return *_second(*guarded, *saved[6:], *along, ctx.link, ctx.wanted), *none
        terms, seed = _terms(ctx.link, saved)
        asked = _asked(ctx, saved)
        return *_as(second(terms, seed, along, asked), saved[:6]), *none


def _asked(ctx: Any, inputs: Any) -> tuple[bool, ...]:
    """Which of the wanted derivatives this backward passes on: H v needs none in ω, J v none in W.

    Args:
        ctx: of a function that is being differentiated.
        inputs: x, W, b, t, ω, s and more.
    """
    wanted, omega = ctx.wanted, 4
    if not wanted[omega] or transformed():
        return wanted
    nodes = iter(ctx.next_functions)  # one for each tensor
    places = [None if part is None else next(nodes)[0] for part in inputs[:6]]
    if not _is_followed(places[omega]):
        return *wanted[:omega], False, *wanted[omega + 1 :]
    if _is_followed(places[1]):
        return wanted
    followed = map(_is_followed, places[:omega])
    return *map(operator.and_, wanted[:omega], followed), *wanted[omega:]


def _is_followed(node: Any) -> bool:
    """Whether the running backward goes on to a node."""
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient is asked for; raising takes 30 µs
        return True


def _terms(link: Link, saved: Any) -> tuple[Terms, Tensor]:
    x, weight, bias, target, omega, seed, share, losses, state = saved
    return Terms(link, x, weight, bias, target, share, omega, losses, state), seed


class _Second(Function):
    """(ẋ, Ẇ, ḃ, ṫ, ω̇) ↦ ∂⟨∇S, (ẋ, Ẇ, ḃ, ṫ, ω̇)⟩/∂(x, W, b, t, ω, s)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        saved, along, (link, wanted) = inputs[:9], inputs[9:14], inputs[14:]
        terms, seed = _terms(link, saved)
        return _as(second(terms, seed, along, wanted), saved[:6])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:14])
        ctx.link = inputs[14]

    @staticmethod
    def backward(ctx: Any, *bars: Any) -> Any:
        saved, along = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
        terms, seed = _terms(ctx.link, saved)
        wanted = [part is not None for part in along]
        total: Parts = (None,) * 5
        if any(bar is not None for bar in bars[:5]):  # symmetric in x, W, b, t, ω
            total = second(terms, seed, bars[:5], [*wanted, False])[:5]
        if bars[5] is not None:
            through = gradient(terms, bars[5], wanted)
            total = tuple(
                known if part is None else plus(known, part)
                for known, part in zip(total, through, strict=True)
            )
        # zeros: `_NoThird` stands before the first six, and raises where they are asked for
        zeros = [None if t is None else torch.zeros_like(t) for t in saved[:6]]
        return *zeros, None, None, None, *_as(total, along), None, None


class _NoThird(Function):
    """The identity; its derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Any) -> Any:
        return tuple(None if t is None else t.view_as(t) for t in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *bars: Any) -> Any:
        raise NoThirdDerivative(
            "torch_bilevel.ops were differentiated three times; they have two derivatives. Write "
            "the loss with torch.nn.functional instead, which has them all: "
            "F.cross_entropy(F.linear(x, weight, bias), target)."
        )


def _applied(cls: type[Function]) -> Callable[..., Any]:
    """``cls.apply``, at a third of its cost where no function transform is active.

    ``apply`` of a function with ``setup_context`` binds its signature anew in every call (80 µs).
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = cls.forward(*inputs)
        cls.setup_context(ctx, inputs, output)
        return output

    body = {"forward": staticmethod(forward), "backward": cls.backward}
    eager: Any = type(Function)(cls.__name__, (Function,), body)  # type: ignore[call-arg]

    def apply(*inputs: Any) -> Any:
        return (cls if transformed() else eager).apply(*inputs)

    return apply


_loss, _gradient, _second, _no_third = map(
    _applied, (_Loss, _Gradient, _Second, _NoThird)
)


def linear_loss(
    link: Link,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    omega: Tensor | None,
    share: Tensor | None,
    summed: bool,
) -> Tensor:
    """Σ κ ω ℓ, or κ ω∘ℓ for every example, (n,), or every output, (c, n).

    Args:
        link: the loss.
        x: (n, d).
        weight: (c, d).
        bias: (c,) or None.
        target: (n,) or (c, n).
        omega: ω, (n,) or None.
        share: κ, (n,) or 0-d, or None; without derivative.
        summed: one number.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # storage as F.linear rounds it
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _loss(x, weight, bias, target, omega, share, link, summed)[0]
