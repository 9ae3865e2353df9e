"""Sums of what programs found each, in a fixed order: no atomics, the same bits every time."""

from __future__ import annotations

from torch import Tensor

from .language import ceil_div, jit, launcher, padded, tl

COLUMNS, ROWS = 128, 16
TILE = 4096  # entries of a narrow array at once


@jit
def add_up(parts, total, block, count, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Some columns of the sum over the first dimension."""
    columns = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    found = tl.zeros((ROWS, COLUMNS), total.dtype.element_ty)
    for first in range(0, count, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows[:, None] < count) & (columns[None, :] < size)
        at = parts + rows[:, None].to(tl.int64) * size + columns[None, :]
        found += tl.load(at, mask=inside, other=0)
    tl.store(total + columns, tl.sum(found, 0), mask=columns < size)


@jit
def _sums_kernel(
    parts, total, count, size, narrow, narrow_total, narrow_count, narrow_size,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, NARROW_ROWS: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    block, blocks = tl.program_id(0), tl.cdiv(size, COLUMNS)
    if block < blocks:
        add_up(parts, total, block, count, size, ROWS, COLUMNS)
    elif NARROW:
        add_up(
            narrow, narrow_total, block - blocks, narrow_count, narrow_size,
            NARROW_ROWS, NARROW,
        )  # fmt: skip


def reference(parts: Tensor) -> Tensor:
    """Σ_g parts_g."""
    return parts.sum(0)


def summed(parts: Tensor) -> Tensor:
    """Σ_g parts_g in one launch; no autotuning.

    Args:
        parts: (G, ...), contiguous.
    """
    return both_summed(parts, parts.new_empty(0, 0))[0]


@launcher
def both_summed(parts: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of two arrays in one launch; no autotuning.

    Args:
        parts: (G, ...), contiguous.
        narrow: the same, of few columns and perhaps many rows.
    """
    total, other = (t.new_empty(t.shape[1:]) for t in (parts, narrow))
    size, few = total.numel(), other.numel()
    width = padded(few, 16) if few else 0
    rows = max(ROWS, TILE // width) if few else ROWS
    count = ceil_div(size, COLUMNS) + (few > 0)
    if count:
        _sums_kernel[(count,)](
            parts, total, len(parts), size, narrow, other, len(narrow), few, ROWS,
            COLUMNS, rows, width,
        )  # fmt: skip
    return total, other
