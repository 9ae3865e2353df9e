"""The formulas of a loss of linear outputs, row by row, inside kernels.

    softmax    ℓ = log Σ exp z − z_t      r = p − e_t       ℓ_zz u = p∘u − p⟨p, u⟩
    logistic   ℓ = log(1 + exp z) − z t   r = σ(z) − t      ℓ_zz u = σ(1 − σ) u
    squared    ℓ = (z − t)²               r = 2 (z − t)     ℓ_zz u = 2 u

with label smoothing ε in the first. The *state* is p for softmax and z for the others, zero in
classes that only pad a block. Blocks are (rows, classes) with ``AXIS=1``, (classes, rows) with
``AXIS=0``. The same formulas in PyTorch are the `Link`s of ``torch_bilevel.ops``.
"""

from __future__ import annotations

from .language import jit, tl

SOFTMAX, LOGISTIC, SQUARED = 0, 1, 2


@jit
def over_rows(value, AXIS: tl.constexpr):
    """A number per row as a block of one class."""
    return tl.expand_dims(value, AXIS)


@jit
def logistic(z):
    """σ(z) and σ(−z), each to full relative accuracy."""
    e = tl.exp(-tl.abs(z))
    small, large = e / (1 + e), 1 / (1 + e)
    return tl.where(z >= 0, large, small), tl.where(z >= 0, small, large)


@jit
def log1p(e):
    """log(1 + e) of a number in [0, 1] to full relative accuracy (Kahan)."""
    one = 1 + e
    exact = one == 1
    return tl.where(exact, e, tl.log(one) * (e / tl.where(exact, 1, one - 1)))


@jit
def places(rows, index, n, classes, AXIS: tl.constexpr):
    """Which entries of a block there are, and where they lie in class-major memory, (c, n)."""
    real = over_rows(rows < n, AXIS) & over_rows(index < classes, 1 - AXIS)
    return real, over_rows(rows, AXIS) + over_rows(index.to(tl.int64), 1 - AXIS) * n


@jit
def load_target(target, rows, index, real, n, LINK: tl.constexpr, AXIS: tl.constexpr):
    """Class indices, a number per row; real targets, a block."""
    if LINK == 0:
        found = tl.load(target + rows, mask=rows < n, other=0)
    else:
        at = over_rows(rows, AXIS) + over_rows(index.to(tl.int64), 1 - AXIS) * n
        found = tl.load(target + at, mask=real, other=0)
    return found


@jit
def scales(
    seed, share, omega, rows, mask, SEED_ROWS: tl.constexpr, SHARE_ROWS: tl.constexpr
):
    """Of some rows s κ and s κ ω, one for all where ``_ROWS`` is 0; without s it is 1."""
    if seed is not None:
        each = tl.load(seed + rows * SEED_ROWS, mask=mask, other=0)
    else:
        each = tl.where(mask, 1.0, 0.0)
    if share is not None:
        each = each * tl.load(share + rows * SHARE_ROWS, mask=mask, other=0)
    scale = each
    if omega is not None:
        scale = each * tl.load(omega + rows, mask=mask, other=0)
    return each, scale


@jit
def curvature(state, u, LINK: tl.constexpr, AXIS: tl.constexpr):
    """ℓ_zz u."""
    if LINK == 0:
        pu = state * u
        found = pu - state * over_rows(tl.sum(pu, AXIS), AXIS)
    elif LINK == 1:
        p, other = logistic(state)
        found = p * other * u
    else:
        found = 2 * u
    return found


@jit
def along(
    state,
    target,
    u,
    index,
    classes,
    SMOOTHING: tl.constexpr,
    LINK: tl.constexpr,
    AXIS: tl.constexpr,
):
    """⟨r, u⟩, summed over outputs, and ℓ_zz u."""
    if LINK == 0:
        hit = over_rows(index, 1 - AXIS) == over_rows(target, AXIS)
        at = tl.sum(tl.where(hit, u, 0), AXIS)
        at = (1 - SMOOTHING) * at + SMOOTHING * (tl.sum(u, AXIS) / classes)
        slope = tl.sum(state * u, AXIS) - at
    elif LINK == 1:
        p, _ = logistic(state)
        slope = tl.sum((p - target) * u, AXIS)
    else:
        slope = tl.sum(2 * (state - target) * u, AXIS)
    return slope, curvature(state, u, LINK, AXIS)


@jit
def value(
    z,
    target,
    index,
    real,
    classes,
    SMOOTHING: tl.constexpr,
    LINK: tl.constexpr,
    AXIS: tl.constexpr,
):
    """ℓ, summed over outputs, r and the state of z."""
    if LINK == 0:
        z = tl.where(real, z, float("-inf"))
        top = tl.max(z, AXIS)
        top = tl.where(top == float("-inf"), 0, top)  # rows that only pad
        shifted = z - over_rows(top, AXIS)
        e = tl.exp(shifted)
        total = tl.sum(e, AXIS)
        total = tl.where(total == 0, 1, total)
        state = e / over_rows(total, AXIS)
        logp = tl.where(real, shifted, 0) - over_rows(tl.log(total), AXIS)
        hit = over_rows(index, 1 - AXIS) == over_rows(target, AXIS)
        loss = -(1 - SMOOTHING) * tl.sum(tl.where(hit, logp, 0), AXIS)
        loss -= SMOOTHING * (tl.sum(tl.where(real, logp, 0), AXIS) / classes)
        # products of arrays: a number alone would be rounded to float32
        r = state - (1 - SMOOTHING) * hit.to(z.dtype)
        r = tl.where(real, r - SMOOTHING * (real.to(z.dtype) / classes), 0)
    elif LINK == 1:
        state = tl.where(real, z, 0)
        p, other = logistic(state)
        each = tl.maximum(state, 0) - state * target + log1p(tl.exp(-tl.abs(state)))
        loss = tl.sum(tl.where(real, each, 0), AXIS)
        r = tl.where(real, p - target, 0)
    else:
        state = tl.where(real, z, 0)
        difference = state - target
        loss = tl.sum(difference * difference, AXIS)
        r = 2 * difference
    return loss, r, state


@jit
def rows_along(
    state, target, u, seed, share, omega, m, rows, index, n, classes,
    SMOOTHING: tl.constexpr, SEED_ROWS: tl.constexpr, SHARE_ROWS: tl.constexpr,
    LINK: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Of some rows s κ ω∘ℓ_zz u; s κ∘⟨r, u⟩ is stored, where there is an m."""
    real, at = places(rows, index, n, classes, AXIS)
    p = tl.load(state + at, mask=real, other=0)
    t = load_target(target, rows, index, real, n, LINK, AXIS)
    each, scale = scales(seed, share, omega, rows, rows < n, SEED_ROWS, SHARE_ROWS)
    u = tl.where(real, u, 0)
    slope, curved = along(p, t, u, index, classes, SMOOTHING, LINK, AXIS)
    if m is not None:
        tl.store(m + rows, each * slope, mask=rows < n)
    return over_rows(scale, AXIS) * curved


@jit
def joint_along(
    z, u, target, share, omega, losses, slopes, rows, index, n, classes,
    SMOOTHING: tl.constexpr, SHARE_ROWS: tl.constexpr, LINK: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """Of some rows κ ω ℓ, κ ω∘r and κ ω∘ℓ_zz u; ℓ and ⟨r, u⟩ are stored."""
    real, _ = places(rows, index, n, classes, AXIS)
    t = load_target(target, rows, index, real, n, LINK, AXIS)
    _, scale = scales(None, share, omega, rows, rows < n, 0, SHARE_ROWS)
    found, r, state = value(z, t, index, real, classes, SMOOTHING, LINK, AXIS)
    u = tl.where(real, u, 0)
    slope, curved = along(state, t, u, index, classes, SMOOTHING, LINK, AXIS)
    tl.store(losses + rows, found, mask=rows < n)
    tl.store(slopes + rows, slope, mask=rows < n)
    factor = over_rows(scale, AXIS)
    return scale * found, factor * r, factor * curved
