"""Descriptions of what a loop does to the gradient between ``backward()`` and ``step()``.

They describe, they never act: the user's loop clips, and unrolled estimators differentiate
through this description of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _checks

__all__ = ["clip_grad_norm", "clip_grad_value"]

GradientTransform = Callable[[list[Tensor]], Sequence[Tensor]]


def clip_grad_norm(max_norm: float, norm_type: float = 2.0) -> GradientTransform:
    """What ``torch.nn.utils.clip_grad_norm_`` does to the gradients of the inner parameters.

    g ← g · min(1, max_norm / (‖g‖ + 1e-6)), with one norm over all gradients.

    Args:
        max_norm: as in torch.
        norm_type: as in torch.

    Returns:
        A function of the list of gradients, for ``optimizer.gradient_transform``.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> clip = tb.clip_grad_norm(1.0)
        >>> [round(float(g), 4) for g in clip([torch.tensor(3.), torch.tensor(4.)])]
        [0.6, 0.8]
    """
    _checks.real("clip_grad_norm", "max_norm", max_norm, positive=True)

    def transform(gradients: list[Tensor]) -> list[Tensor]:
        norms = [torch.linalg.vector_norm(g, norm_type) for g in gradients]
        total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        return [g * factor for g in gradients]

    return transform


def clip_grad_value(clip_value: float) -> GradientTransform:
    """What ``torch.nn.utils.clip_grad_value_`` does: every entry clamped to ±clip_value.

    Args:
        clip_value: as in torch.

    Returns:
        A function of the list of gradients, for ``optimizer.gradient_transform``.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> tb.clip_grad_value(1.0)([torch.tensor([0.5, -3.0])])
        [tensor([ 0.5000, -1.0000])]
    """
    _checks.real("clip_grad_value", "clip_value", clip_value, positive=True)
    return lambda gradients: [g.clamp(-clip_value, clip_value) for g in gradients]
