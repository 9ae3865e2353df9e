"""Matrix products of few rows with many; on one thread the many are taken in blocks.

    W xᵀ    outputs of all examples       (c, d) · (d, n) → (c, n)
    L x     a sum over all examples       (c, n) · (n, d) → (c, d)

c is small and x is read once for either. Over thousands of rows at once the libraries of a CPU
take up to twice as long as over blocks that stay in a core's cache. With several threads they
divide the rows themselves, and blocks would make each wait for the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._transforms import may_look

BLOCK = 2**18  # entries of x: 1 MiB in float32
LEAST = 128  # rows


def blocks(x: Tensor) -> Sequence[Tensor]:
    """The rows of x, (n, d), in order, in parts; in one where parts would not help."""
    n, d = x.shape
    few = n * d <= BLOCK or not x.is_cpu
    if few or not may_look() or torch.get_num_threads() > 1:
        return (x,)
    count = -(-n * d // BLOCK)
    return x.split(max(LEAST, -(-n // count)))


def outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W xᵀ + b of shape (c, n).

    Args:
        x: (n, d).
        weight: (c, d).
        bias: (c,) or None.
    """
    if bias is None:
        parts = [weight @ rows.mT for rows in blocks(x)]
    else:
        column = bias.unsqueeze(1)
        parts = [torch.addmm(column, weight, rows.mT) for rows in blocks(x)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def plus_sum(total: Tensor | None, left: Tensor, x: Tensor) -> Tensor:
    """``total`` + L x of shape (c, d), where the total may be empty.

    Args:
        total: (c, d) or None.
        left: L, (c, n).
        x: (n, d).
    """
    parts = blocks(x)
    lefts = (left,) if len(parts) == 1 else left.split(len(parts[0]), 1)
    for part, rows in zip(lefts, parts, strict=True):
        total = part @ rows if total is None else torch.addmm(total, part, rows)
    assert total is not None
    return total
