"""Hessian products and joint oracles of losses of linear outputs: two kernels, each reads x once.

    forward   u = V xᵀ + v_b and the formulas of its rows: q = s κ ω ∘ ℓ_zz u, (c, n), and m
    back      q x, the sum over some rows in each program, added up by `sums`

With [W; V] in the first and both left factors in the second, the joint oracle. Few classes are the
narrow side of both products, for which general matrix products have no tiles: of 60000 rows, 784
features and 10 classes these read x at three quarters of an H200's bandwidth. Tiles have a third
dimension where a program would have less to do than its warps can: slices of features (forward) and
of rows (back), a warp each, whose products are added at the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .language import DTYPES, ceil_div, jit, launcher, padded, programs, tl
from .links import joint_along, rows_along
from .one_pass import Direction, load_tile, precision, with_bias
from .one_pass import reference as reference
from .rows import per_row
from .sums import both_summed

MOST_CLASSES = 32  # in a program
FEW_CLASSES = 16  # most that "auto" takes them for
WAVES = 2  # programs of the second product for each processor of the device


class Forward(NamedTuple):
    """A tile of the first product: rows, and columns in slices."""

    rows: int
    slices: int  # 1: a tile without a third dimension
    columns: int
    num_warps: int
    num_stages: int


class Back(NamedTuple):
    """A tile of the second product: columns, and rows in slices."""

    slices: int
    rows: int
    columns: int
    num_warps: int
    num_stages: int


def worthwhile(x: Tensor, weight: Tensor) -> bool:
    """Whether these kernels beat general matrix products, by what was measured on an H200."""
    return len(weight) <= FEW_CLASSES and weight.dtype is torch.float32


def forward_tile(n: int, width: int, dtype: torch.dtype) -> Forward:
    """What was fastest for n rows on an H200; ``width``: of all weights, padded."""
    if dtype is torch.float64 or width > 32:
        return Forward(16, 4, 16, 4, 2)
    if n < 2**11:
        return Forward(16, 4, 32, 4, 4)
    if n < 2**14:
        return Forward(32, 4, 32, 4, 3)
    return Forward(64, 1, 64, 4, 3)


def back_tile(n: int, width: int, dtype: torch.dtype) -> Back:
    """The same for the second product; ``width``: of all left factors, padded."""
    if dtype is torch.float64 or width > 32:
        return Back(4, 16, 16, 4, 2)
    if width == 16 or n < 2**12:
        return Back(4, 32, 32, 4, 3)
    return Back(4, 16, 64, 4, 4)


@jit
def forward(
    x, weight, rows, n, d, classes, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    COUNT: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, SLICES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some rows of x Wᵀ, (ROWS, COUNT · C); ``weight``: one or two of (c, d), side by side."""
    index = tl.arange(0, COUNT * C)
    real = index % C < classes
    line = (index // C * classes + index % C).to(tl.int64) * d
    if SLICES == 1:
        found = tl.zeros((ROWS, COUNT * C), DTYPE)
        for first in range(0, d, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            here = load_tile(x, rows, columns, n, d, DTYPE)
            inside = (columns[:, None] < d) & real[None, :]
            w = tl.load(weight + line[None, :] + columns[:, None], mask=inside, other=0)
            found = tl.dot(here, w, found, input_precision=PRECISION, out_dtype=DTYPE)
    else:
        parts = tl.zeros((SLICES, ROWS, COUNT * C), DTYPE)
        steps = tl.arange(0, SLICES)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        for first in range(0, d, SLICES * COLUMNS):
            columns = first + steps
            inside = (rows[None, :, None] < n) & (columns[:, None, :] < d)
            at = x + rows[None, :, None].to(tl.int64) * d + columns[:, None, :]
            here = tl.load(at, mask=inside, other=0).to(DTYPE)
            inside = (columns[:, :, None] < d) & real[None, None, :]
            at = weight + line[None, None, :] + columns[:, :, None]
            w = tl.load(at, mask=inside, other=0)
            parts = tl.dot(here, w, parts, input_precision=PRECISION, out_dtype=DTYPE)
        found = tl.sum(parts, 0)
    return found


@jit
def store_left(left, q, first, rows, index, n, classes):
    """Lines of the left factor of the second product, from the first on, class-major."""
    at = left + rows[:, None] + (first + index)[None, :].to(tl.int64) * n
    tl.store(at, q, mask=(rows[:, None] < n) & (index[None, :] < classes))


@jit
def _along_kernel(
    x, weight, bias, state, target, seed, share, omega, left, sums, m, n, d, classes,
    SMOOTHING: tl.constexpr, SEED_ROWS: tl.constexpr, SHARE_ROWS: tl.constexpr,
    LINK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, SLICES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, C)
    u = forward(
        x, weight, rows, n, d, classes, DTYPE, PRECISION, 1, C, ROWS, SLICES, COLUMNS
    )
    u = with_bias(u, bias, index, classes)
    q = rows_along(
        state, target, u, seed, share, omega, m, rows, index, n, classes, SMOOTHING,
        SEED_ROWS, SHARE_ROWS, LINK, 1,
    )  # fmt: skip
    store_left(left, q, 0, rows, index, n, classes)
    sums += tl.program_id(0) * classes
    tl.store(sums + index, tl.sum(q, 0), mask=index < classes)


@jit
def _joint_along_kernel(
    x, weight, bias, bias_v, target, share, omega, left, sums, losses, slopes, n, d,
    classes, SMOOTHING: tl.constexpr, SHARE_ROWS: tl.constexpr, LINK: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    SLICES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, C)
    both = forward(
        x, weight, rows, n, d, classes, DTYPE, PRECISION, 2, C, ROWS, SLICES, COLUMNS
    )
    z, u = tl.split(tl.permute(tl.reshape(both, (ROWS, 2, C)), (0, 2, 1)))
    z = with_bias(z, bias, index, classes)
    u = with_bias(u, bias_v, index, classes)
    found, r, q = joint_along(
        z, u, target, share, omega, losses, slopes, rows, index, n, classes, SMOOTHING,
        SHARE_ROWS, LINK, 1,
    )  # fmt: skip
    store_left(left, r, 0, rows, index, n, classes)
    store_left(left, q, classes, rows, index, n, classes)
    sums += tl.program_id(0) * (2 * classes + 1)
    tl.store(sums + index, tl.sum(r, 0), mask=index < classes)
    tl.store(sums + classes + index, tl.sum(q, 0), mask=index < classes)
    tl.store(sums + 2 * classes, tl.sum(found, 0))


@jit
def _back_kernel(
    x, left, total, n, d, lines, each, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, SLICES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part, index = tl.program_id(1), tl.arange(0, C)
    steps = tl.arange(0, SLICES)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    last = tl.minimum(n, (part + 1) * each)
    parts = tl.zeros((SLICES, C, COLUMNS), DTYPE)
    for first in range(part * each, last, SLICES * ROWS):
        rows = first + steps
        inside = (rows[:, :, None] < last) & (columns[None, None, :] < d)
        at = x + rows[:, :, None].to(tl.int64) * d + columns[None, None, :]
        here = tl.load(at, mask=inside, other=0).to(DTYPE)
        inside = (index[None, :, None] < lines) & (rows[:, None, :] < last)
        at = left + index[None, :, None].to(tl.int64) * n + rows[:, None, :]
        q = tl.load(at, mask=inside, other=0)
        parts = tl.dot(q, here, parts, input_precision=PRECISION, out_dtype=DTYPE)
    inside = (index[:, None] < lines) & (columns[None, :] < d)
    at = total + (part.to(tl.int64) * lines + index[:, None]) * d + columns[None, :]
    tl.store(at, tl.sum(parts, 0), mask=inside)


def _back(x: Tensor, left: Tensor, sums: Tensor, word: str) -> tuple[Tensor, Tensor]:
    """The second product, and the sums of what the first kernel's programs found."""
    (n, d), lines, width = x.shape, len(left), padded(len(left), 16)
    tile = back_tile(n, width, left.dtype)
    across, rows = ceil_div(d, tile.columns), tile.slices * tile.rows
    # enough programs for the device, and two tiles for each of them
    most = max(1, ceil_div(n, 2 * rows))
    count = max(1, programs(x, most * across, WAVES) // across)
    each = ceil_div(ceil_div(n, count), rows) * rows
    total = left.new_empty(ceil_div(n, each), lines, d)
    _back_kernel[(across, len(total))](
        x, left, total, n, d, lines, each, DTYPES[left.dtype], word, width,
        *tile[:3], num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return both_summed(total, sums)


@launcher
def hessian_product(
    link: Any,
    x: Tensor,
    v: Direction,
    state: Tensor,
    target: Tensor,
    seed: Tensor,
    share: Tensor | None = None,
    omega: Tensor | None = None,
    wants_slope: bool = True,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """H v and m from two visits to x, in three launches.

    No autotuning: tiles go by n (`forward_tile`, `back_tile`). Takes and returns what
    `one_pass.hessian_product` does.
    """
    (n, d), classes, C = x.shape, len(v.weight), padded(len(v.weight), 16)
    m = state.new_empty(n) if wants_slope else None
    word, tile = precision(state.dtype, tf32), forward_tile(n, C, state.dtype)
    count, left = ceil_div(n, tile.rows), torch.empty_like(state)
    sums = state.new_empty(count, classes)
    _along_kernel[(count,)](
        x, v.weight, v.bias, state, target, seed, share, omega, left, sums, m, n, d,
        classes, link.smoothing, per_row(seed), per_row(share), link.kind,
        DTYPES[state.dtype], word, C, *tile[:3], num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return *_back(x, left, sums, word), m


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
    """Loss, gradient, H v and J v from two visits to x, in four launches.

    Takes and returns what `joint.joint_oracle` does.
    """
    (n, d), (weight, bias) = x.shape, at
    classes, new, C = len(weight), weight.new_empty, padded(len(weight), 16)
    word, tile = precision(weight.dtype, tf32), forward_tile(n, 2 * C, weight.dtype)
    count = ceil_div(n, tile.rows)
    losses, slopes, left = new(n), new(n), new(2 * classes, n)
    sums = new(count, 2 * classes + 1)
    _joint_along_kernel[(count,)](
        x, torch.cat([weight, v.weight]), bias, v.bias, target, share, omega, left,
        sums, losses, slopes, n, d, classes, link.smoothing, per_row(share), link.kind,
        DTYPES[weight.dtype], word, C, *tile[:3], num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    total, sums = _back(x, left, sums, word)
    return losses, slopes, total.view(2, classes, d), sums
