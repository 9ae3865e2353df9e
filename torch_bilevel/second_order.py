"""A region in which an ordinary model is twice differentiable.

Three fast paths of PyTorch have no second derivative: compiled functions (AOTAutograd), the fused
kernels behind ``scaled_dot_product_attention``, and cuDNN's recurrent kernels. Inside
`second_order` compiled functions run eagerly, attention uses its mathematical form and cuDNN's
recurrent kernels are off; values agree with the fast paths up to rounding.

The region is entered once per forward evaluation (about 25 µs), never per product.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["second_order"]

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """The function, never traced by ``torch.compile``: for hooks and entry points."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


@contextlib.contextmanager
def second_order(recurrent: bool = False) -> Iterator[None]:
    """Make what is evaluated inside twice differentiable.

    Args:
        recurrent: the model contains an ``nn.RNNBase``; cuDNN is switched off for it.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> q = torch.randn(1, 1, 4, 8, requires_grad=True)
        >>> with tb.second_order():
        ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q).sum()
        >>> (g,) = torch.autograd.grad(out, q, create_graph=True)
        >>> torch.autograd.grad(g.sum(), q)[0].shape
        torch.Size([1, 1, 4, 8])
    """
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # its first import costs seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent and torch.backends.cudnn.is_available():
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
