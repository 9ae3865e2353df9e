"""All steps of conjugate gradients for many few-shot heads in one launch, a program for each.

    A_t v = Σ_i a_i (ℓ_zz (V x_i + v_b)) (x_i, 1)ᵀ + λ_t v,     A_t v_t = b_t,     t = 1, …, T

*Direct* (d ≤ 64): x and the vectors (c, d) stay on the chip. *In sample space*, any d: every
vector of the iteration from zero is α b + Sᵀ x with S (n, c), so that a step costs n² c whatever d
is; with K = x xᵀ and B = x bᵀ,

    x v = α B + K S,    A v = (λ α, λ S + D(x v)),    ⟨v, v⟩ = α² ⟨b, b⟩ + α ⟨B, S⟩ + ⟨S, x v⟩

x is read twice in all. Where d < n, b lies in the span of x and these sums cancel; as n ≤ 64 too,
that is always direct.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .language import DTYPES, jit, launcher, padded, tl
from .links import curvature, over_rows, places
from .one_pass import Direction, load_tile, load_turned, precision
from .reduce import finite

MOST_ROWS = 64  # of a task: K is in registers
DIRECT = 64  # most features for the direct form


class Heads(NamedTuple):
    """Solutions for all tasks."""

    value: Direction  # (T, c, d) and (T, c) or None
    num_steps: Tensor  # (T,)
    residual: Tensor  # ‖b − A v‖/‖b‖, (T,); zero where b is
    negative_curvature: Tensor  # (T,)


def reference(
    link: Any,
    x: Tensor,
    state: Tensor,
    scale: Tensor,
    damping: Tensor,
    b: Direction,
    num_steps: int,
) -> Heads:
    """The same by batched operations of PyTorch; see `head_cg`."""
    (T, n, d), c = x.shape, state.shape[1]
    tasks, eps = damping.expand(T)[:, None], torch.finfo(x.dtype).eps
    columns = x if b.bias is None else torch.cat([x, x.new_ones(T, n, 1)], 2)
    parts = [b.weight] if b.bias is None else [b.weight, b.bias.unsqueeze(2)]
    right = torch.cat(parts, 2).reshape(T, -1)

    def times(v: Tensor) -> Tensor:
        u = v.reshape(T, c, -1) @ columns.mT  # (T, c, n)
        curved = link.along(
            state.movedim(0, 1), _no_target(link, state), u.movedim(0, 1)
        )
        q = curved[1].movedim(1, 0) * scale[:, None]
        return (q @ columns).reshape(T, -1) + tasks * v

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum(1, keepdim=True)

    r, p, rr = right, right, dot(right, right)
    v = 0 * rr * right
    bb, going, steps = rr, rr > 0, torch.zeros_like(rr, dtype=torch.int64)
    negative = torch.zeros_like(going)
    least = eps**2 * bb  # below, there is nothing that the precision can resolve
    for _ in range(num_steps):
        q = times(p)
        pq, pp = dot(p, q), dot(p, p)
        stretch = 2 * (pq - tasks * pp).abs() + tasks.abs() * pp
        going = going & (rr > least)
        lost = going & ~torch.isfinite(pq)  # NaN stays NaN
        negative = negative | (going & (pq < -10 * eps * stretch))
        going = going & (pq > 10 * eps * stretch) & ~lost
        alpha = torch.where(lost, torch.nan, 0.0).to(rr.dtype)
        alpha = torch.where(going, rr / torch.where(going, pq, 1), alpha)
        v, r = v + alpha * p, r - alpha * q
        new = torch.where(going, dot(r, r), rr)
        p = torch.where(going, r + (new / torch.where(rr > 0, rr, 1)) * p, p)
        steps, rr = steps + going, new
    left = right - times(v)
    residual = (dot(left, left) / torch.where(bb > 0, bb, 1)).sqrt()
    found = v.reshape(T, c, -1)
    value = Direction(found[..., :d], None if b.bias is None else found[..., d])
    return Heads(value, steps[:, 0], residual[:, 0], negative[:, 0])


def _no_target(link: Any, state: Tensor) -> Tensor:
    """Curvature does not depend on targets."""
    T, c, n = state.shape
    if link.elementwise:
        return state.new_zeros(c, T, n)
    return state.new_zeros(T, n, dtype=torch.int64)


@jit
def _of_task(
    state, scale, damping, task, index, samples, n, classes, DAMPING_EACH: tl.constexpr
):
    """The state, (n, c), a and λ of one task."""
    real, at = places(samples, index, n, classes, 1)
    first = task.to(tl.int64) * n
    p = tl.load(state + first * classes + at, mask=real, other=0)
    a = tl.load(scale + first + samples, mask=samples < n, other=0)
    return p, a, tl.load(damping + task * DAMPING_EACH)


@jit
def _total(block):
    return tl.sum(tl.sum(block, 1), 0)


@jit
def _coefficients(rr, bb, pp, curved, damping, going, EPS: tl.constexpr):
    """Whether to go on, whether pᵀA p is negative, and α."""
    pq = damping * pp + curved
    stretch = 2 * tl.abs(curved) + tl.abs(damping) * pp
    going = going & (rr > EPS * EPS * bb)  # less is nothing the precision can resolve
    lost = going & (finite(pq) == 0)  # NaN stays NaN
    bad = going & (pq < -10 * EPS * stretch)
    going = going & (pq > 10 * EPS * stretch) & (lost == 0)
    alpha = tl.where(lost, float("nan"), 0)
    return going, bad, tl.where(going, rr / tl.where(going, pq, 1), alpha)


@jit
def _report(info, task, tasks, bb, rr, steps, negative):
    rr = tl.where(rr < 0, 0, rr)  # of sums that cancel
    tl.store(info + task, tl.sqrt(rr / tl.where(bb > 0, bb, 1)))
    tl.store(info + tasks + task, steps)
    tl.store(info + 2 * tasks + task, negative)


@jit
def _samples_kernel(
    x, state, scale, damping, b, bias, value, value_b, info, n, d, classes, num_steps,
    DAMPING_EACH: tl.constexpr, LINK: tl.constexpr, EPS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0)
    index, samples = tl.arange(0, C), tl.arange(0, N)
    x, b = x + task.to(tl.int64) * n * d, b + task.to(tl.int64) * classes * d
    value += task.to(tl.int64) * classes * d
    p_of, a, pull = _of_task(
        state, scale, damping, task, index, samples, n, classes, DAMPING_EACH
    )
    K, B = tl.zeros((N, N), DTYPE), tl.zeros((N, C), DTYPE)
    squares = tl.zeros((COLUMNS, C), DTYPE)
    for first in range(0, d, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        here = load_tile(x, samples, columns, n, d, DTYPE)
        right = load_turned(b, index, columns, classes, d, DTYPE)
        K = tl.dot(here, tl.trans(here), K, input_precision=PRECISION, out_dtype=DTYPE)
        B = tl.dot(here, right, B, input_precision=PRECISION, out_dtype=DTYPE)
        squares += right * right
    bb = _total(squares)
    if bias is not None:
        right_b = tl.load(bias + task * classes + index, mask=index < classes, other=0)
        K += 1
        B = tl.where(samples[:, None] < n, B + right_b[None, :], 0)
        bb += tl.sum(right_b * right_b, 0)
    # a vector is (α, S), with its outputs y = α B + K S
    of_x, of_r, of_p = bb * 0, bb * 0 + 1, bb * 0 + 1
    in_x, in_r, in_p = B * 0, B * 0, B * 0
    out_r, out_p = B, B
    rr, steps, negative, going = bb, bb * 0, bb < 0, bb > 0
    for _ in range(num_steps):
        curved = over_rows(a, 1) * curvature(p_of, out_p, LINK, 1)
        pp = of_p * of_p * bb + of_p * _total(B * in_p) + _total(in_p * out_p)
        going, bad, alpha = _coefficients(
            rr, bb, pp, _total(out_p * curved), pull, going, EPS
        )
        negative = negative | bad
        of_x, in_x = of_x + alpha * of_p, in_x + alpha * in_p
        of_r, in_r = of_r - alpha * pull * of_p, in_r - alpha * (pull * in_p + curved)
        out_r = of_r * B + tl.dot(K, in_r, input_precision=PRECISION, out_dtype=DTYPE)
        new = of_r * of_r * bb + of_r * _total(B * in_r) + _total(in_r * out_r)
        new = tl.maximum(new, 0)
        beta = new / tl.where(rr > 0, rr, 1)
        of_p = tl.where(going, of_r + beta * of_p, of_p)
        in_p = tl.where(going, in_r + beta * in_p, in_p)
        out_p = tl.where(going, out_r + beta * out_p, out_p)
        rr, steps = tl.where(going, new, rr), steps + going.to(DTYPE)
    # b − A x
    out_x = of_x * B + tl.dot(K, in_x, input_precision=PRECISION, out_dtype=DTYPE)
    of_r = 1 - pull * of_x
    in_r = -pull * in_x - over_rows(a, 1) * curvature(p_of, out_x, LINK, 1)
    out_r = of_r * B + tl.dot(K, in_r, input_precision=PRECISION, out_dtype=DTYPE)
    rr = of_r * of_r * bb + of_r * _total(B * in_r) + _total(in_r * out_r)
    turned = tl.trans(in_x)
    for first in range(0, d, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        here = load_tile(x, samples, columns, n, d, DTYPE)
        inside = (index[:, None] < classes) & (columns[None, :] < d)
        at = index[:, None] * d + columns[None, :]
        found = of_x * tl.load(b + at, mask=inside, other=0)
        found = tl.dot(turned, here, found, input_precision=PRECISION, out_dtype=DTYPE)
        tl.store(value + at, found, mask=inside)
    if bias is not None:
        found_b = of_x * right_b + tl.sum(in_x, 0)
        tl.store(value_b + task * classes + index, found_b, mask=index < classes)
    _report(info, task, tl.num_programs(0), bb, rr, steps, negative.to(DTYPE))


@jit
def _direct_kernel(
    x, state, scale, damping, b, bias, value, value_b, info, n, d, classes, num_steps,
    DAMPING_EACH: tl.constexpr, LINK: tl.constexpr, EPS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0)
    index, samples = tl.arange(0, C), tl.arange(0, N)
    columns = tl.arange(0, COLUMNS)
    at = index[:, None] * d + columns[None, :]
    inside = (index[:, None] < classes) & (columns[None, :] < d)
    b, value = (
        b + task.to(tl.int64) * classes * d, value + task.to(tl.int64) * classes * d
    )  # fmt: skip
    here = load_tile(x + task.to(tl.int64) * n * d, samples, columns, n, d, DTYPE)
    p_of, a, pull = _of_task(
        state, scale, damping, task, index, samples, n, classes, DAMPING_EACH
    )
    r = tl.load(b + at, mask=inside, other=0)
    r_b = tl.zeros((C,), DTYPE)
    if bias is not None:
        r_b = tl.load(bias + task * classes + index, mask=index < classes, other=0)
    bb = _total(r * r) + tl.sum(r_b * r_b, 0)
    v, p, v_b, p_b = r * 0 + bb * 0, r, r_b * 0 + bb * 0, r_b
    rr, steps, negative, going = bb, bb * 0, bb < 0, bb > 0
    q, q_b = v, v_b
    for k in range(num_steps + 1):
        last = (steps * 0 + k) == num_steps  # the product with v, for the residual
        w, w_b = tl.where(last, v, p), tl.where(last, v_b, p_b)
        u = tl.dot(here, tl.trans(w), input_precision=PRECISION, out_dtype=DTYPE)
        u += w_b[None, :]
        curved = over_rows(a, 1) * curvature(p_of, u, LINK, 1)
        turned = tl.trans(curved)
        q = tl.dot(turned, here, input_precision=PRECISION, out_dtype=DTYPE) + pull * w
        if bias is not None:
            q_b = tl.sum(curved, 0) + pull * w_b
        pp = _total(w * w) + tl.sum(w_b * w_b, 0)
        going, bad, alpha = _coefficients(
            rr, bb, pp, _total(u * curved), pull, going & (last == 0), EPS
        )
        negative = negative | bad
        v, v_b = v + alpha * p, v_b + alpha * p_b
        r, r_b = r - alpha * q, r_b - alpha * q_b
        new = _total(r * r) + tl.sum(r_b * r_b, 0)
        beta = new / tl.where(rr > 0, rr, 1)
        p = tl.where(going, r + beta * p, p)
        p_b = tl.where(going, r_b + beta * p_b, p_b)
        rr, steps = tl.where(going, new, rr), steps + going.to(DTYPE)
    r = tl.load(b + at, mask=inside, other=0) - q
    rr = _total(r * r)
    tl.store(value + at, v, mask=inside)
    if bias is not None:
        r_b = tl.load(bias + task * classes + index, mask=index < classes, other=0)
        r_b -= q_b
        rr += tl.sum(r_b * r_b, 0)
        tl.store(value_b + task * classes + index, v_b, mask=index < classes)
    _report(info, task, tl.num_programs(0), bb, rr, steps, negative.to(DTYPE))


def suits(n: int, classes: int) -> str | None:
    """Why a task is not for these kernels, or None."""
    if classes > 16:
        return f"{classes} classes, and a program holds 16"
    if n > MOST_ROWS:
        return f"{n} examples in a task, and a program holds {MOST_ROWS}"
    return None


@launcher
def head_cg(
    link: Any,
    x: Tensor,
    state: Tensor,
    scale: Tensor,
    damping: Tensor,
    b: Direction,
    num_steps: int,
) -> Heads:
    """``num_steps`` steps of CG from zero for every task; see `suits`.

    A task whose residual is zero, or that meets negative curvature, stays where it is.

    Args:
        link: the loss; its ``kind`` is one of `links`.
        x: (T, n, d), contiguous, float32 or float64, as all that follow.
        state: (T, c, n), contiguous.
        scale: a = s κ ω, (T, n), contiguous.
        damping: λ, 0-d or (T,).
        b: right-hand sides, (T, c, d), and (T, c) or None, contiguous.
        num_steps: how many.
    """
    (tasks, n, d), classes = x.shape, state.shape[1]
    value, info = torch.empty_like(b.weight), x.new_empty(3, tasks)
    value_b = None if b.bias is None else torch.empty_like(b.bias)
    direct = d <= DIRECT
    if tasks:
        (_direct_kernel if direct else _samples_kernel)[(tasks,)](
            x, state, scale, damping, b.weight, b.bias, value, value_b, info, n, d,
            classes, num_steps, DAMPING_EACH=damping.dim(), LINK=link.kind,
            EPS=torch.finfo(x.dtype).eps, DTYPE=DTYPES[x.dtype],
            PRECISION=precision(x.dtype, False), N=padded(n, 16), C=padded(classes, 16),
            COLUMNS=padded(d, 16) if direct else 32,
        )  # fmt: skip
    residual, steps, negative = info
    return Heads(
        Direction(value, value_b), steps.nan_to_num().long(), residual, negative > 0
    )
