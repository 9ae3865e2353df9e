"""The joint oracle of a loss of linear outputs: loss, gradient, H v and J v from one visit to x.

    z = W x + b,  u = V x + v_b
    S = Σ κ ω ℓ,   ∇S = Σ κ ω r (x, 1)ᵀ,   H v = Σ κ ω (ℓ_zz u) (x, 1)ᵀ,
    ℓ and ⟨r, u⟩: over κ, the derivatives of S and of ⟨∇S, v⟩ with respect to ω

What a single-loop method needs of a batch. Tiles, sums and accuracy as the chunked form of
`one_pass`; each tile of x goes through the products with W and V together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._blocks import outputs, plus_sum
from .language import DTYPES, Tuned, ceil_div, jit, launcher, padded, programs, tl
from .links import joint_along
from .one_pass import (
    KEY,
    LEAST_ROWS,
    Direction,
    add_product,
    clear,
    load_tile,
    load_turned,
    precision,
    size_class,
    with_bias,
)
from .rows import per_row
from .sums import both_summed


class Joint(NamedTuple):
    """What the joint oracle finds."""

    loss: Tensor  # S, 0-d
    losses: Tensor  # ℓ, summed over outputs, (n,)
    slopes: Tensor  # ⟨r, u⟩, (n,)
    gradient: Direction  # ∇S
    product: Direction  # H v


def reference(
    link: Any,
    x: Tensor,
    at: Direction,
    v: Direction,
    target: Tensor,
    share: Tensor | None,
    omega: Tensor | None,
) -> Joint:
    """The same by operations of PyTorch; see `joint_oracle`."""
    x, classes = x.to(at.weight.dtype), len(at.weight)
    both = outputs(x, torch.cat([at.weight, v.weight]), None)
    z, u = both[:classes], both[classes:]
    if at.bias is not None and v.bias is not None:
        z, u = z + at.bias.unsqueeze(1), u + v.bias.unsqueeze(1)
    losses, state = link.value(z, target)
    r = link.residual(state, target)
    slopes, curved = link.along(state, target, u)
    if losses.dim() == 2:
        losses, slopes = losses.sum(0), slopes.sum(0)
    scale = share if omega is None else omega if share is None else share * omega
    if scale is None:
        loss = losses.sum()
    else:
        loss, r, curved = (scale * losses).sum(), scale * r, scale * curved
    left = torch.cat([r, curved])
    first, second = plus_sum(None, left, x).split(classes)
    sums = [None, None] if at.bias is None else left.sum(1).split(classes)
    return Joint(
        loss, losses, slopes, Direction(first, sums[0]), Direction(second, sums[1])
    )


@jit
def _joint_kernel(
    x, weight, bias, weight_v, bias_v, target, share, omega, losses, slopes,
    total, sums, n, d, classes, SMOOTHING: tl.constexpr, SHARE_ROWS: tl.constexpr,
    LINK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    index = tl.arange(0, C)
    total += program.to(tl.int64) * 2 * classes * d
    total_v = total + classes * d
    clear(total, index, program, n, d, classes, ROWS, COLUMNS)
    clear(total_v, index, program, n, d, classes, ROWS, COLUMNS)
    sum_b, sum_v, sum_loss = (
        tl.zeros((C,), DTYPE), tl.zeros((C,), DTYPE), tl.zeros((ROWS,), DTYPE)
    )  # fmt: skip
    for tile in range(program, tl.cdiv(n, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        z, u = tl.zeros((ROWS, C), DTYPE), tl.zeros((ROWS, C), DTYPE)
        for first in range(0, d, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            here = load_tile(x, rows, columns, n, d, DTYPE)
            w = load_turned(weight, index, columns, classes, d, DTYPE)
            z = tl.dot(here, w, z, input_precision=PRECISION, out_dtype=DTYPE)
            v = load_turned(weight_v, index, columns, classes, d, DTYPE)
            u = tl.dot(here, v, u, input_precision=PRECISION, out_dtype=DTYPE)
        z = with_bias(z, bias, index, classes)
        u = with_bias(u, bias_v, index, classes)
        found, r, q = joint_along(
            z, u, target, share, omega, losses, slopes, rows, index, n, classes,
            SMOOTHING, SHARE_ROWS, LINK, 1,
        )  # fmt: skip
        sum_loss += found
        sum_b += tl.sum(r, 0)
        sum_v += tl.sum(q, 0)
        left, left_v = tl.trans(r), tl.trans(q)
        for first in range(0, d, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            here = load_tile(x, rows, columns, n, d, DTYPE)
            add_product(
                left, here, total, index, columns, tile, d, classes, DTYPE, PRECISION
            )
            add_product(
                left_v, here, total_v, index, columns, tile, d, classes, DTYPE,
                PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # other threads read what these have stored
    inside = index < classes
    sums += program * (2 * classes + 1)
    tl.store(sums + index, sum_b, mask=inside)
    tl.store(sums + classes + index, sum_v, mask=inside)
    tl.store(sums + 2 * classes, tl.sum(sum_loss, 0))


JOINT = Tuned(
    _joint_kernel,
    [
        {"ROWS": 64, "COLUMNS": 32, "num_warps": 4, "num_stages": 3},
        {"ROWS": 64, "COLUMNS": 32, "num_warps": 8, "num_stages": 3},
        {"ROWS": 128, "COLUMNS": 32, "num_warps": 8, "num_stages": 3},
    ],
    KEY,
)


@launcher
def joint_oracle(
    link: Any,
    x: Tensor,
    at: Direction,
    v: Direction,
    target: Tensor,
    share: Tensor | None = None,
    omega: Tensor | None = None,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradient, H v and J v: one kernel, and one that adds up what its programs found.

    Tuned over tiles for each (d, c, dtypes, precision, size of n).

    Args:
        link: the loss; its ``kind`` is one of `links`.
        x: (n, d), not empty, contiguous, float64, float32, or 16-bit storage.
        at: W and b, float32 or float64; what follows has their dtype.
        v: the direction; both biases or none.
        target: class indices (n,) or numbers (c, n), contiguous.
        share: κ, 0-d, (n,) or None.
        omega: ω, (n,) or None.
        tf32: products may be rounded to TF32.

    Returns:
        ℓ and ⟨r, u⟩, (n,); ∇S and H v of the weight, (2, c, d); both of the bias and S, (2c + 1,).
    """
    (n, d), (weight, bias) = x.shape, at
    classes, new = len(weight), weight.new_empty
    count = programs(x, ceil_div(n, LEAST_ROWS))
    losses, slopes = new(n), new(n)
    total, sums = new(count, 2, classes, d), new(count, 2 * classes + 1)
    JOINT[(count,)](
        x, weight, bias, v.weight, v.bias, target, share, omega,
        losses, slopes, total, sums, n, d, classes, SMOOTHING=link.smoothing,
        SHARE_ROWS=per_row(share), LINK=link.kind, DTYPE=DTYPES[weight.dtype],
        PRECISION=precision(weight.dtype, tf32), C=padded(classes, 16),
        SIZE=size_class(n),
    )  # fmt: skip
    total, sums = both_summed(total, sums)
    return losses, slopes, total, sums
