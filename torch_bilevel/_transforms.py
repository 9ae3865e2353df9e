"""Who sees operations besides eager PyTorch: function transforms, and the compiler."""

from __future__ import annotations

import torch


def transformed() -> bool:
    """Whether a function transform (vmap, grad, jvp, ...) is active."""
    return torch._C._are_functorch_transforms_active()


def may_look() -> bool:
    """Whether Python may branch on the value of a tensor."""
    return not (torch.compiler.is_compiling() or transformed())
