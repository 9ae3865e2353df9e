"""What the operations have in common: checks of arguments, and the sum over examples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._blocks import outputs
from ..errors import InvalidLoss
from . import formulas
from .along import loss_along
from .cut import cutting, fusing, model_output
from .foresee import direction, foreseeing
from .formulas import times, weighted_sum
from .fused import resolve
from .linear_loss import linear_loss
from .link import Link


def check_tensors(
    name: str, x: Any, weight: Any, bias: Any, target: Any, example_weights: Any
) -> None:
    """Refuse what is not a tensor.

    Raises:
        InvalidLoss: with what was seen and what to write.
    """
    given = ("x", x), ("weight", weight), ("bias", bias), ("target", target)
    for word, value in (*given, ("example_weights", example_weights)):
        optional = value is None and word in ("bias", "example_weights")
        if not (optional or isinstance(value, Tensor)):
            raise InvalidLoss(
                f"{name}: {word} is a {type(value).__name__}, and a tensor is needed. With a "
                f"layer: {name}(x, layer.weight, layer.bias, target, example_weights=...)."
            )


def check(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    example_weights: Tensor | None,
    reduction: str,
) -> None:
    """Refuse what does not fit.

    Raises:
        InvalidLoss: with what was seen and what to write.
    """
    if reduction not in ("mean", "sum", "none"):
        raise InvalidLoss(
            f"{name}(reduction={reduction!r}): write 'mean', 'sum' or 'none'."
        )
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise InvalidLoss(
            f"{name}: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; they must be "
            "(n, d) and (c, d), as nn.Linear has them. Images: x.flatten(1); sequences: "
            "x.flatten(0, -2)."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InvalidLoss(
            f"{name}: bias has shape {tuple(bias.shape)} and weight {tuple(weight.shape)}; bias "
            f"must be ({weight.shape[0]},) or None."
        )
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise InvalidLoss(
            f"{name}: x is {x.dtype} and weight {weight.dtype}; both must be floating point. "
            "Write x.float()."
        )
    if example_weights is not None and example_weights.shape != x.shape[:1]:
        raise InvalidLoss(
            f"{name}: example_weights has shape {tuple(example_weights.shape)}; one weight for "
            f"each of the {len(x)} rows of x is needed."
        )


def real_target(name: str, target: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Targets that are real numbers, one for each output, in the precision of the outputs.

    Raises:
        InvalidLoss: the shape does not fit.
    """
    shape = len(x), len(weight)
    if target.shape != shape:
        classes = name == "linear_cross_entropy" and target.dim() == 1
        hint = (
            "Class indices are integers: target.long()."
            if classes
            else (
                "One output: target.unsqueeze(1)." if target.shape == shape[:1] else ""
            )
        )
        raise InvalidLoss(
            f"{name}: target has shape {tuple(target.shape)} and dtype {target.dtype}, and the "
            f"outputs have shape {shape}. {hint}".rstrip()
        )
    return target.to(_precision(x, weight))


def too_small(x: Tensor, weight: Tensor, kernel: str, elementwise: bool) -> bool:
    """Whether an autograd function in Python would cost more than it saves.

    Not where it costs nothing: in programs that are recorded; nor with a kernel, on a device where
    launches cost more than Python. In compiled code it always would: the compiler fuses plain
    operations itself, and dynamo takes what such a function saves for constants.
    """
    classes = weight.shape[0]
    small = formulas.ALONG if foreseeing(weight) else formulas.SMALL
    return torch.compiler.is_compiling() or (
        kernel == "torch"
        and x.numel() * classes <= small
        and (elementwise or len(x) * classes <= formulas.FEW)
        and not fusing()
        and not torch.is_autocast_enabled(x.device.type)
    )


def as_written(x: Tensor, weight: Tensor, kernel: str, elementwise: bool) -> bool:
    """Whether to compute what is too small as ``torch.nn.functional`` does, fastest to first order.

    Under function transforms the formulas' own operations are faster: `loss_of` takes them.
    """
    active = cutting() or torch._C._are_functorch_transforms_active()
    return too_small(x, weight, kernel, elementwise) and not active


def plain_loss(
    function: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    example_weights: Tensor | None,
    count: Tensor | None,
    reduction: str,
) -> Tensor:
    """The same by operations of PyTorch.

    Args:
        function: of the outputs, (n, c), and ``reduction``.
        x: (n, d).
        weight: (c, d).
        bias: (c,) or None.
        example_weights: ω, (n,) or None.
        count: how many losses, one for each example, a mean with weights is over; None for all.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """
    z = _outputs(x, weight, bias)
    if example_weights is None:
        return function(z, reduction=reduction)
    losses = function(z, reduction="none")
    omega = _cast(example_weights, z.dtype)
    if count is not None:
        return torch.dot(losses, omega) / count.clamp(min=1) + 0 / count
    losses = losses * (omega if losses.dim() == 1 else omega.unsqueeze(1))
    if reduction == "mean":
        return losses.mean()
    return losses.sum() if reduction == "sum" else losses


def loss_of(
    link: Link,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    example_weights: Tensor | None,
    valid: Tensor | None,
    reduction: str,
) -> Tensor:
    """The weighted losses, their sum, or their mean.

    Args:
        link: the loss.
        x: (n, d).
        weight: (c, d).
        bias: (c,) or None.
        target: (n,), or class-major (c, n).
        example_weights: ω, (n,) or None.
        valid: which examples count, (n,), or None for all.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """
    dtype = _precision(x, weight)
    share = None if valid is None else valid.to(dtype)
    summed = reduction != "none"
    given = link, x, weight, bias, target, example_weights
    if reduction != "mean":
        return _shared_loss(*given, share, summed)
    # A mean over nothing is 0/0, as PyTorch has it, and its derivative zero.
    if share is not None:
        count = share.sum()
        return _shared_loss(*given, share / count.clamp(min=1), summed) + 0 / count
    size = len(x) * (len(weight) if link.elementwise else 1)
    share = torch.full((), 1 / max(size, 1), dtype=dtype, device=x.device)
    loss = _shared_loss(*given, share, summed)
    return loss if size else loss + torch.nan


def _shared_loss(
    link: Link,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    example_weights: Tensor | None,
    share: Tensor | None,
    summed: bool,
) -> Tensor:
    """κ ω ℓ for every example, or their sum, κ the share of each."""
    dtype = _precision(x, weight)
    if example_weights is not None:
        example_weights = _cast(example_weights, dtype)
    cut = cutting()  # the model ends at the outputs: its loss is a function of its own
    if cut or too_small(x, weight, link.kernel, link.elementwise):
        if cut:
            z = model_output(_outputs(x, weight, bias)).mT
        else:
            b = None if bias is None else bias.to(dtype)
            z = outputs(x.to(dtype), weight.to(dtype), b)
        losses = link.losses(z, target)
        if summed:
            return weighted_sum(losses, share, example_weights)
        losses = times(times(losses, share), example_weights)
        return losses.mT if losses.dim() == 2 else losses
    along = direction(weight, bias)
    constant = not (x.requires_grad or target.requires_grad)
    exact = weight.dtype is dtype and not torch.is_autocast_enabled(x.device.type)
    if along and constant and summed and exact:
        return loss_along(link, x, weight, bias, target, example_weights, share, along)
    losses = linear_loss(link, x, weight, bias, target, example_weights, share, summed)
    return losses.mT if losses.dim() == 2 else losses


def elementwise(
    name: str,
    kind: type[Link],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    example_weights: Tensor | None,
    reduction: str,
    kernel: str,
) -> Tensor:
    """A loss with one term for every output; a weight of shape (d,) has one without dimension."""
    check_tensors(name, x, weight, bias, target, example_weights)
    single = weight.dim() == 1
    if single:
        weight, target = weight.unsqueeze(0), target.unsqueeze(-1)
        bias = None if bias is None else bias.reshape(1)
    check(name, x, weight, bias, example_weights, reduction)
    target = real_target(name, target, x, weight)
    given = example_weights
    kernel = resolve(name, kernel, kind.kind, x, weight)
    if as_written(x, weight, kernel, kind.elementwise):
        function = partial(kind.plain, target=target)
        result = plain_loss(function, x, weight, bias, given, None, reduction)
    else:
        t = target.mT
        result = loss_of(kind(kernel), x, weight, bias, t, given, None, reduction)
    return result.squeeze(-1) if single and reduction == "none" else result


def _precision(x: Tensor, weight: Tensor) -> torch.dtype:
    """Of the arithmetic: 16-bit storage is accumulated in float32."""
    if x.dtype is weight.dtype and x.dtype in (torch.float32, torch.float64):
        return x.dtype
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return torch.promote_types(dtype, torch.float32)


def _outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """z, (n, c), by operations of PyTorch."""
    dtype = _precision(x, weight)
    bias = None if bias is None else _cast(bias, dtype)
    return F.linear(_cast(x, dtype), _cast(weight, dtype), bias)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype; without a call where it is in it."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)
