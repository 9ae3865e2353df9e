"""A Hessian product of a loss of linear outputs that reads x once.

    H v = Σ_i s_i κ_i ω_i (ℓ_zz (V x_i + v_b)) (x_i, 1)ᵀ        at outputs whose state is known

Each program goes through tiles of rows. *Resident*: a tile of x stays on the chip between the two
products, and the sum, (c, d) and transposed so that few classes fill registers evenly, beside it.
*Chunked*: any d, with float32 accuracy on tensor cores (three TF32 products each); a tile is read
again, piece by piece, from the second-level cache, where the sum lies too. Programs' sums are added
in a fixed order by `sums`: no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .language import (
    DTYPES,
    Tuned,
    ceil_div,
    jit,
    launcher,
    padded,
    programs,
    shared_memory,
    tl,
)
from .links import rows_along
from .rows import per_row
from .rows import reference as between
from .sums import both_summed

LEAST_ROWS = 64  # in tiles where n is large
RESIDENT = 1024  # most features for it in TF32
ROOM = 200_000  # bytes of shared memory it takes
MOST_CLASSES = 64  # in a program
PRECISE = 128  # and in float32 accuracy: more would leave the registers


class Direction(NamedTuple):
    """V and v_b."""

    weight: Tensor  # (c, d)
    bias: Tensor | None  # (c,)


def reference(
    link: Any,
    x: Tensor,
    v: Direction,
    state: Tensor,
    target: Tensor,
    seed: Tensor,
    share: Tensor | None,
    omega: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(H v of weight and bias, m) by operations of PyTorch; see `hessian_product`."""
    u = v.weight @ x.to(v.weight.dtype).mT
    u = u if v.bias is None else u + v.bias.unsqueeze(1)
    q, m = between(link, state, target, u, seed, share, omega)
    return q @ x.to(q.dtype), q.sum(1), m


def size_class(n: int) -> int:
    """Tiles are chosen anew for few, many and very many rows."""
    return 0 if n < 2**13 else 1 if n < 2**16 else 2


@jit
def clear(
    total, index, program, n, d, classes, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Zero the sum of a program that no tile is left for."""
    if program >= tl.cdiv(n, ROWS):
        for first in range(0, d, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            inside = (index[:, None] < classes) & (columns[None, :] < d)
            at = total + index[:, None].to(tl.int64) * d + columns[None, :]
            nothing = (index[:, None] + columns[None, :]) * 0
            tl.store(at, nothing.to(total.dtype.element_ty), mask=inside)


@jit
def load_tile(x, rows, columns, n, d, DTYPE: tl.constexpr):
    """Some rows and columns of x, zero outside."""
    inside = (rows[:, None] < n) & (columns[None, :] < d)
    at = rows[:, None].to(tl.int64) * d + columns[None, :]
    return tl.load(x + at, mask=inside, other=0).to(DTYPE)


@jit
def load_turned(weight, index, columns, classes, d, DTYPE: tl.constexpr):
    """Some columns of W, (columns, classes)."""
    inside = (columns[:, None] < d) & (index[None, :] < classes)
    at = weight + index[None, :].to(tl.int64) * d + columns[:, None]
    return tl.load(at, mask=inside, other=0).to(DTYPE)


@jit
def with_bias(z, bias, index, classes):
    """The outputs z + b, where there is a b."""
    if bias is not None:
        z += tl.load(bias + index, mask=index < classes, other=0)[None, :]
    return z


@jit
def add_product(
    left, here, total, index, columns, tile, d, classes,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add left @ here to numbers in memory; a program's first tile sets them."""
    part = tl.dot(left, here, input_precision=PRECISION, out_dtype=DTYPE)
    inside = (index[:, None] < classes) & (columns[None, :] < d)
    at = total + index[:, None].to(tl.int64) * d + columns[None, :]
    later = (columns[None, :] * 0 + tile) >= tl.num_programs(0)
    part += tl.load(at, mask=inside & later, other=0)
    tl.store(at, part, mask=inside)


@jit
def _chunked_kernel(
    x, weight, bias, state, target, seed, share, omega, total, total_b, m, n, d,
    classes, SMOOTHING: tl.constexpr, SEED_ROWS: tl.constexpr,
    SHARE_ROWS: tl.constexpr, LINK: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    index = tl.arange(0, C)
    total += program.to(tl.int64) * classes * d
    clear(total, index, program, n, d, classes, ROWS, COLUMNS)
    sum_b = tl.zeros((C,), DTYPE)
    for tile in range(program, tl.cdiv(n, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        u = tl.zeros((ROWS, C), DTYPE)
        for first in range(0, d, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            here = load_tile(x, rows, columns, n, d, DTYPE)
            w = load_turned(weight, index, columns, classes, d, DTYPE)
            u = tl.dot(here, w, u, input_precision=PRECISION, out_dtype=DTYPE)
        u = with_bias(u, bias, index, classes)
        q = rows_along(
            state, target, u, seed, share, omega, m, rows, index, n, classes, SMOOTHING,
            SEED_ROWS, SHARE_ROWS, LINK, 1,
        )  # fmt: skip
        sum_b += tl.sum(q, 0)
        left = tl.trans(q)
        for first in range(0, d, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            here = load_tile(x, rows, columns, n, d, DTYPE)
            add_product(
                left, here, total, index, columns, tile, d, classes, DTYPE, PRECISION
            )
        tl.debug_barrier()  # other threads read what these have stored
    tl.store(total_b + program * classes + index, sum_b, mask=index < classes)


@jit
def _resident_kernel(
    x, weight, bias, state, target, seed, share, omega, total, total_b, m, n, d,
    classes, SMOOTHING: tl.constexpr, SEED_ROWS: tl.constexpr,
    SHARE_ROWS: tl.constexpr, LINK: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    index, columns = tl.arange(0, C), tl.arange(0, COLUMNS)
    w = load_turned(weight, index, columns, classes, d, DTYPE)
    found = tl.zeros((C, COLUMNS), DTYPE)
    sum_b = tl.zeros((C,), DTYPE)
    for tile in range(program, tl.cdiv(n, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        here = load_tile(x, rows, columns, n, d, DTYPE)
        u = tl.dot(here, w, input_precision=PRECISION, out_dtype=DTYPE)
        u = with_bias(u, bias, index, classes)
        q = rows_along(
            state, target, u, seed, share, omega, m, rows, index, n, classes, SMOOTHING,
            SEED_ROWS, SHARE_ROWS, LINK, 1,
        )  # fmt: skip
        sum_b += tl.sum(q, 0)
        found = tl.dot(
            tl.trans(q), here, found, input_precision=PRECISION, out_dtype=DTYPE
        )
    inside = (index[:, None] < classes) & (columns[None, :] < d)
    at = total + (program.to(tl.int64) * classes + index[:, None]) * d
    tl.store(at + columns[None, :], found, mask=inside)
    tl.store(total_b + program * classes + index, sum_b, mask=index < classes)


KEY = ("d", "classes", "PRECISION", "SIZE")
CHUNKED = Tuned(
    _chunked_kernel,
    [
        {"ROWS": 64, "COLUMNS": 64, "num_warps": 8, "num_stages": 3},
        {"ROWS": 128, "COLUMNS": 64, "num_warps": 8, "num_stages": 3},
        {"ROWS": 64, "COLUMNS": 64, "num_warps": 4, "num_stages": 3},
        {"ROWS": 64, "COLUMNS": 128, "num_warps": 8, "num_stages": 2},
    ],
    KEY,
)
# COLUMNS hold all of d. ROWS and warps: enough numbers a thread for 128-bit loads, few enough for
# its registers, in Triton 3.6 to 3.9
RESIDENT_TILES = {
    16: (64, 8),
    32: (64, 8),
    64: (64, 8),
    128: (16, 8),
    256: (16, 8),
    512: (16, 4),
    1024: (16, 8),
}
RESIDENT_KERNELS = {
    columns: Tuned(
        _resident_kernel,
        [
            {"ROWS": rows, "COLUMNS": columns, "num_warps": warps, "num_stages": stages}
            for stages in (2, 1)
        ],
        KEY,
    )
    for columns, (rows, warps) in RESIDENT_TILES.items()
}


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
    """H v and m from one visit to x.

    Tuned over tiles for each (d, c, dtypes, precision, size of n).

    Args:
        link: the loss; its ``kind`` is one of `links`.
        x: (n, d), not empty, contiguous, float64, float32, or 16-bit storage.
        v: the direction, float32 or float64; what follows has its dtype.
        state: (c, n), contiguous.
        target: class indices (n,) or numbers (c, n), contiguous.
        seed: s, 0-d or (n,).
        share: κ, 0-d, (n,) or None.
        omega: ω, (n,) or None.
        wants_slope: m is wanted.
        tf32: products may be rounded to TF32.

    Returns:
        H v of the weight, (c, d), and of the bias, (c,), and m, (n,) or None.
    """
    (n, d), classes = x.shape, len(v.weight)
    m = state.new_empty(n) if wants_slope else None
    count = programs(x, ceil_div(n, LEAST_ROWS))
    total = state.new_empty(count, classes, d)
    total_b = state.new_empty(count, classes)
    room = RESIDENT if shared_memory(x) >= ROOM else RESIDENT // 4
    if d <= (room if tf32 else PRECISE):
        kernel = RESIDENT_KERNELS[padded(d, 16)]
    else:
        kernel = CHUNKED
    kernel[(count,)](
        x, v.weight, v.bias, state, target, seed, share, omega, total, total_b, m, n, d,
        classes, SMOOTHING=link.smoothing, SEED_ROWS=per_row(seed),
        SHARE_ROWS=per_row(share), LINK=link.kind, DTYPE=DTYPES[state.dtype],
        PRECISION=precision(state.dtype, tf32), C=padded(classes, 16),
        SIZE=size_class(n),
    )  # fmt: skip
    return *both_summed(total, total_b), m


def precision(dtype: torch.dtype, tf32: bool) -> str:
    """How matrix products are computed."""
    if dtype is torch.float64:
        return "ieee"
    return "tf32" if tf32 else "tf32x3"
