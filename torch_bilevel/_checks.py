"""Checks of arguments, each with the message a user reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import BilevelError, UnsupportedParameter


def positive_int(owner: str, name: str, value: Any, *, optional: bool = False) -> None:
    """Raise unless ``value`` is an integer of at least 1 (or None where allowed).

    Raises:
        ValueError: otherwise.
    """
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        hint = "a whole number ≥ 1" + (" or None" if optional else "")
        raise ValueError(f"{owner}({name}={value!r}): {name} must be {hint}.")


def real(
    owner: str,
    name: str,
    value: Any,
    *,
    positive: bool = False,
    optional: bool = False,
) -> None:
    """Raise unless ``value`` is a finite number ≥ 0 (> 0 where ``positive``).

    Raises:
        ValueError: otherwise.
    """
    if value is None and optional:
        return
    good = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (value > 0 or (value == 0 and not positive))
    )
    if not good:
        bound = "> 0" if positive else "≥ 0"
        raise ValueError(f"{owner}({name}={value!r}): {name} must be a number {bound}.")


def plain_sgd(owner: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an outer optimizer whose step is not x − lr·G.

    Raises:
        BilevelError: with what to write.
    """
    found = [
        f"{key}={group[key]}"
        for group in optimizer.param_groups
        for key in ("momentum", "weight_decay", "maximize")
        if group.get(key)
    ]
    if not isinstance(optimizer, torch.optim.SGD) or found:
        seen = ", ".join([type(optimizer).__name__, *dict.fromkeys(found)])
        raise BilevelError(
            f"{owner} moves the outer variables by a rule of its own that needs a plain gradient "
            f"step, and the outer optimizer is {seen}. Write outer=torch.optim.SGD([...], lr=...), "
            "without momentum or weight decay."
        )


def parameters(role: str, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse parameters that cannot be differentiated or overwritten in place.

    Raises:
        UnsupportedParameter: sparse, complex, integer, inference-mode, expanded or meta
            tensors, and non-leaf tensors.
    """
    for tensor, name in zip(tensors, names, strict=True):
        what = None
        if tensor.layout is not torch.strided:
            what, remedy = "sparse", "pass a dense parameter"
        elif tensor.is_complex():
            what, remedy = "complex", "use torch.view_as_real and two real channels"
        elif not tensor.is_floating_point():
            what, remedy = f"of dtype {tensor.dtype}", "use a floating-point tensor"
        elif tensor.is_inference():
            what, remedy = (
                "an inference-mode tensor",
                "create it outside torch.inference_mode()",
            )
        elif tensor.device.type == "meta":
            what, remedy = "on the meta device", "materialise it first"
        elif not tensor.is_leaf:
            what, remedy = "not a leaf", "detach() it and set requires_grad_()"
        elif any(
            stride == 0 and size > 1
            for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            what, remedy = "an expanded view", "clone() it first"
        if what:
            raise UnsupportedParameter(
                f"The {role} parameter {name!r} (shape {tuple(tensor.shape)}) is {what}; "
                f"{remedy}."
            )
