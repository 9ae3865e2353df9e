"""A region in which an ordinary model is twice differentiable.

Three fast paths of PyTorch have no second derivative: compiled functions (AOTAutograd), the fused
kernels behind ``scaled_dot_product_attention``, and cuDNN's recurrent kernels. Inside
`second_order` compiled functions run eagerly, attention uses its mathematical form and cuDNN's
recurrent kernels are off; values agree with the fast paths up to rounding. A fourth has a second
derivative that is *wrong*: the fused ``torch._weight_norm`` treats the norm it saved as a constant
(``gradgradcheck`` fails in torch 2.13); it is evaluated from its definition v·g/‖v‖ instead.

The region is entered once per forward evaluation (about 25 µs), never per product.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["second_order"]

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """The function, never traced by ``torch.compile``: for hooks and entry points.

    ``torch.compiler.disable`` alone would do, at several microseconds a call in eager code.
    """
    disabled = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return disabled(*args, **kwargs)  # type: ignore[operator]
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def untraced(function: F) -> F:
    """The function for one call into whose frames dynamo does not look, if it is there at all.

    Where a graph was broken, dynamo tries the frames inside one by one.
    """
    if "torch._dynamo" not in sys.modules:
        return function
    return torch.compiler.disable(function)  # type: ignore[return-value]


def opaque(reason: str) -> Callable[[F], F]:
    """A function around which ``torch.compile`` breaks the graph, or says why it would have to.

    As ``torch.compiler.disable``, which imports dynamo.

    Args:
        reason: a sentence, part of the error under ``fullgraph=True``.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return untraced(function)(*args, **kwargs)

        call._torchdynamo_disable = True  # type: ignore[attr-defined]
        call._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def uncompiled_method(method: F) -> F:
    """As `uncompiled`, for a method; dynamo is not imported before it is called."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            disabled = torch.compiler.disable(method)
            return disabled(self, *args, **kwargs)  # type: ignore[operator]
        return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


class _WeightNormByDefinition(TorchFunctionMode):
    """w = g v/‖v‖ from differentiable operations."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextlib.contextmanager
def second_order(recurrent: bool = False, weight_norm: bool = False) -> Iterator[None]:
    """Make what is evaluated inside twice differentiable.

    Args:
        recurrent: the model contains an ``nn.RNNBase``; cuDNN is switched off for it.
        weight_norm: the model contains weight normalisation.

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
        if weight_norm:
            stack.enter_context(_WeightNormByDefinition())
        yield
