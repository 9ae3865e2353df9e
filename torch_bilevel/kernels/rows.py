"""The rows between the two matrix products of a Hessian product.

    u = V xᵀ + v_b        (c, n), from the first
    q = s κ ω ∘ ℓ_zz u    (c, n), for the second:  H v = (q x, q 1)
    m = s κ ∘ ⟨r, u⟩      (n,),   the derivative J v with respect to ω

With W and V in the first product and both left factors in the second, the same for the joint
oracle: see `joint_rows`. What a GPU takes for more classes than `two_pass`, and for float64: state
and u are read once, 12 bytes per output and row in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .language import ceil_div, jit, launcher, padded, tl
from .links import joint_along, places, rows_along
from .sums import summed

MOST_CLASSES = 128  # in registers, without spills
BLOCK = 2048  # entries of u in a program


def reference(
    link: Any,
    state: Tensor,
    target: Tensor,
    u: Tensor,
    seed: Tensor,
    share: Tensor | None,
    omega: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The left factor q, and m, by operations of PyTorch; see `curved_rows`.

    Args:
        link: the formulas of the loss.
        state: (c, n).
        target: (n,) or (c, n).
        u: (c, n).
        seed: s, 0-d or (n,).
        share: κ, 0-d, (n,) or None.
        omega: ω, (n,) or None.
    """
    slope, curved = link.along(state, target, u)
    slope = slope if slope.dim() == 1 else slope.sum(0)
    each = seed if share is None else seed * share
    return (each if omega is None else each * omega) * curved, each * slope


@jit
def _rows_kernel(
    state, target, u, bias, seed, share, omega, q, m, n, classes,
    SMOOTHING: tl.constexpr, SEED_ROWS: tl.constexpr, SHARE_ROWS: tl.constexpr, LINK: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.arange(0, C)
    real, at = places(rows, index, n, classes, 0)
    along_v = tl.load(u + at, mask=real, other=0)
    if bias is not None:
        along_v += tl.load(bias + index, mask=index < classes, other=0)[:, None]
    found = rows_along(
        state, target, along_v, seed, share, omega, m, rows, index, n, classes,
        SMOOTHING, SEED_ROWS, SHARE_ROWS, LINK, 0,
    )  # fmt: skip
    tl.store(q + at, found, mask=real)


@launcher
def curved_rows(
    link: Any,
    state: Tensor,
    target: Tensor,
    u: Tensor,
    seed: Tensor,
    share: Tensor | None = None,
    omega: Tensor | None = None,
    bias: Tensor | None = None,
    wants_slope: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The left factor q, and m, in one launch.

    No autotuning: a program takes 2048 entries whatever the shape.

    Args:
        link: the loss; its ``kind`` is one of `links`.
        state: (c, n), contiguous, float32 or float64, as all that follow.
        target: class indices (n,) or numbers (c, n).
        u: (c, n), without the bias.
        seed: s, 0-d or (n,).
        share: κ, 0-d, (n,) or None.
        omega: ω, (n,) or None.
        bias: v_b, (c,) or None, added to u.
        wants_slope: m is wanted.

    Returns:
        q, and m or None.
    """
    classes, n = state.shape
    q = torch.empty_like(state)
    m = state.new_empty(n) if wants_slope else None
    C = padded(classes)
    block = max(16, BLOCK // C)
    if q.numel():
        _rows_kernel[(ceil_div(n, block),)](
            state, target, u, bias, seed, share, omega, q, m, n, classes,
            link.smoothing, per_row(seed), per_row(share), link.kind, C, block,
        )  # fmt: skip
    return q, m


@jit
def _joint_rows_kernel(
    both, bias, bias_v, target, share, omega, loss, losses, slopes, left, n,
    classes, SMOOTHING: tl.constexpr, SHARE_ROWS: tl.constexpr, LINK: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.arange(0, C)
    real, at = places(rows, index, n, classes, 0)
    _, second = places(rows, index + classes, n, 2 * classes, 0)
    z = tl.load(both + at, mask=real, other=0)
    u = tl.load(both + second, mask=real, other=0)
    if bias is not None:
        z += tl.load(bias + index, mask=index < classes, other=0)[:, None]
        u += tl.load(bias_v + index, mask=index < classes, other=0)[:, None]
    found, r, curved = joint_along(
        z, u, target, share, omega, losses, slopes, rows, index, n, classes, SMOOTHING,
        SHARE_ROWS, LINK, 0,
    )  # fmt: skip
    tl.store(left + at, r, mask=real)
    tl.store(left + second, curved, mask=real)
    tl.store(loss + tl.program_id(0), tl.sum(found, 0))


@launcher
def joint_rows(
    link: Any,
    both: Tensor,
    biases: tuple[Tensor | None, Tensor | None],
    target: Tensor,
    share: Tensor | None = None,
    omega: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows between the two matrix products of the joint oracle, in one launch.

    No autotuning, as in `curved_rows`.

    Args:
        link: the loss; its ``kind`` is one of `links`.
        both: W xᵀ and V xᵀ, (2c, n), contiguous.
        biases: b and v_b; both or none.
        target: class indices (n,) or numbers (c, n).
        share: κ, 0-d, (n,) or None.
        omega: ω, (n,) or None.

    Returns:
        S, 0-d; ℓ and ⟨r, u⟩, summed over outputs, (n,); κ ω∘r and κ ω∘ℓ_zz u, (2c, n).
    """
    twice, n = both.shape
    new, C = both.new_empty, padded(twice // 2)
    block = max(16, BLOCK // C)
    count = ceil_div(n, block)
    loss, losses, slopes, left = new(count), new(n), new(n), torch.empty_like(both)
    _joint_rows_kernel[(count,)](
        both, *biases, target, share, omega, loss, losses, slopes,
        left, n, twice // 2, link.smoothing, per_row(share), link.kind, C, block,
    )  # fmt: skip
    return summed(loss), losses, slopes, left


def per_row(value: Tensor | None) -> int:
    """Whether there is one for each row."""
    return int(value is not None and value.dim() > 0)
