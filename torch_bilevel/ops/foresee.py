"""A direction that is known before the loss is evaluated, as in single-loop methods.

SOBA and its like take one product with H and J per batch, along a v they have before the batch
comes. Then x need be read only twice for the loss, its gradient, H v and J v together: W and v go
through one matrix product, and the residual and its derivative along v through another. The result
is handed out when the product with just this v is asked for; any other v is computed as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_known: list[dict[int, Tensor]] = []


@contextlib.contextmanager
def foreseen(tensors: Sequence[Tensor], along: Sequence[Tensor]) -> Iterator[None]:
    """Products with the Hessian of what is evaluated inside will be asked for along one direction.

    Args:
        tensors: leaves.
        along: their parts of the direction, not to be written to until the product was taken.
    """
    _known.append({id(t): v for t, v in zip(tensors, along, strict=True)})
    try:
        yield
    finally:
        _known.pop()


def foreseeing(weight: Tensor) -> bool:
    """Whether a product along a known direction of a weight will be asked for."""
    if not _known or torch._C._are_functorch_transforms_active():
        return False
    return id(weight) in _known[-1]


def direction(
    weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """The parts of the foreseen direction of weight and bias; None where none is."""
    if not foreseeing(weight):
        return None
    known = _known[-1]
    if bias is not None and id(bias) not in known:
        return None
    return known[id(weight)], None if bias is None else known[id(bias)]


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are the same memory."""
    if a is None or b is None:
        return a is b
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )
