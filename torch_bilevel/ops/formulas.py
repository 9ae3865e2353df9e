"""Two derivatives of a loss of linear outputs, reading x as rarely as possible.

    z_i = W x_i + b,    ℓ_i = ℓ(z_i, t_i),    S = s Σ_i κ_i ω_i ℓ_i

ω are weights of the examples, κ says which count and by how much, s is the gradient that comes in
(or one for each ℓ_i, without the sum). With r = ∂_z ℓ, a = s κ ω and, for a direction
(ẋ, Ẇ, ḃ, ṫ, ω̇), u_i = Ẇ x_i + W ẋ_i + ḃ, the derivatives of S are, everything class-major (z of
shape (c, n)),

    ∂_W: (a∘r) x,   ∂_b: (a∘r) 1,   ∂_x: (a∘r)ᵀ W,   ∂_t: a∘ℓ_t,   ∂_ω: s κ∘ℓ                  (1)

and those of ⟨∇S, (ẋ, Ẇ, ḃ, ṫ, ω̇)⟩, with m = ⟨r, u⟩ + ⟨ℓ_t, ṫ⟩ and
q = a∘(ℓ_zz u + ℓ_zt ṫ) + s κ ω̇∘r,

    ∂_W: q x + (a∘r) ẋ,   ∂_b: q 1,   ∂_x: qᵀ W + (a∘r)ᵀ Ẇ,                                  (2)
    ∂_t: a∘(ℓ_tz u + ℓ_tt ṫ) + s κ ω̇∘ℓ_t,   ∂_ω: s κ∘m,   ∂_s: κ ω∘m + κ ω̇∘ℓ

A product with H costs two matrix products, and its cross-derivative with ω nothing more; see
`_blocks` for how they are taken. The state of z is kept where it is small, and computed again,
chunk by chunk, where it is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._blocks import outputs, plus_sum
from ..kernels.joint import Joint
from ..kernels.joint import reference as joint_of_chunk
from ..kernels.one_pass import Direction
from .fused import hessian_product, joint_oracle
from .link import KEEP, Link

CHUNK = 2**20  # entries of z in a chunk, and of x where it is converted
DEVICE_CHUNK = 2**28  # where launches cost more than reading twice
SMALL = 2**23  # n·d·c; below, an autograd function costs more than it saves
ALONG = 2**20  # the same where one visit to x gives H v too, see `foresee`
FEW = 2**14  # n·c; above, a softmax by plain operations costs more than the function

Parts = tuple["Tensor | None", ...]
F = TypeVar("F", bound=Callable[..., Any])


class Terms(NamedTuple):
    """What S is made of, besides s."""

    link: Link
    x: Tensor  # (n, d)
    weight: Tensor  # (c, d)
    bias: Tensor | None  # (c,)
    target: Tensor  # (n,) or (c, n)
    share: Tensor | None  # κ, (n,) or 0-d; None: 1
    omega: Tensor | None  # ω, (n,)
    losses: Tensor | None = None  # ℓ
    state: Tensor | None = None


def precisely(function: F) -> F:
    """The first argument in the precision of the arithmetic, autocast off.

    16-bit storage is accumulated in float32, also in a backward inside an autocast region.
    """

    @functools.wraps(function)
    def call(terms: Terms, *args: Any) -> Any:
        kinds = {t.dtype for t in (terms.x, terms.weight, terms.bias) if t is not None}
        if len(kinds) > 1 or kinds <= {torch.float16, torch.bfloat16}:
            dtype = functools.reduce(torch.promote_types, kinds, torch.float32)
            bias = None if terms.bias is None else terms.bias.to(dtype)
            terms = terms._replace(weight=terms.weight.to(dtype), bias=bias)
        kind = terms.x.device.type
        if not torch.is_autocast_enabled(kind):
            return function(terms, *args)
        with torch.autocast(kind, enabled=False):
            return function(terms, *args)

    return call  # type: ignore[return-value]


def _at(part: Tensor, rows: slice) -> Tensor:
    """Some rows of what is class-major, or one for all."""
    return part if part.dim() == 0 or rows == slice(None) else part[..., rows]


def _rows(part: Tensor | None, rows: slice) -> Tensor | None:
    return None if part is None else _at(part, rows)


def _chunks(terms: Terms) -> Iterator[tuple[slice, Terms]]:
    """Rows, with what belongs to them; all at once where they are few."""
    (n, d), dtype = terms.x.shape, terms.weight.dtype
    cpu, converted = terms.x.is_cpu, terms.x.dtype is not dtype
    width = max(d if converted or not cpu else 1, len(terms.weight))
    rows = max(256, (CHUNK if cpu else DEVICE_CHUNK) // width)
    if n < 2 * rows:
        yield slice(None), _whole(terms)
        return
    for first in range(0, n, rows):
        at = slice(first, first + rows)
        _, x, weight, bias, target, *rest = terms
        part = Terms(
            terms.link, x[at].to(dtype), weight, bias, target[..., at],
            *(_rows(t, at) for t in rest),
        )  # fmt: skip
        yield at, part


def _whole(terms: Terms) -> Terms:
    dtype = terms.weight.dtype
    return terms if terms.x.dtype is dtype else terms._replace(x=terms.x.to(dtype))


def _known(terms: Terms) -> Tensor:
    """The state, computed again where it was not kept."""
    if terms.state is not None:
        return terms.state
    return terms.link.value(outputs(terms.x, terms.weight, terms.bias), terms.target)[1]


def times(a: Tensor, b: Tensor | None) -> Tensor:
    """a∘b, where b may be 1."""
    return a if b is None else a * b


def plus(total: Tensor | None, part: Tensor) -> Tensor:
    """A sum that may be empty."""
    return part if total is None else total + part


def _whole_of(parts: Sequence[Tensor], dim: int = -1) -> Tensor:
    """Chunks together, without a copy where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    return _whole_of(parts, dim) if parts else None


def weighted_sum(losses: Tensor, share: Tensor | None, omega: Tensor | None) -> Tensor:
    """Σ κ ω ℓ."""
    each = losses if omega is None else _each(losses)
    if share is None or share.dim() == 0:
        return times(times(each, omega).sum(), share)
    return torch.dot(each, times(share, omega))


def _each(values: Tensor) -> Tensor:
    """Per example."""
    return values if values.dim() == 1 else values.sum(0)


@precisely
def values(terms: Terms) -> tuple[Tensor, Tensor | None]:
    """ℓ, and the state where it is small enough to be kept."""
    link, n, c = terms.link, len(terms.x), len(terms.weight)
    if n * c <= KEEP:
        z = [outputs(part.x, part.weight, part.bias) for _, part in _chunks(terms)]
        return link.value(_whole_of(z), terms.target)
    found = [
        link.value(outputs(part.x, part.weight, part.bias), part.target)[0]
        for _, part in _chunks(terms)
    ]
    return torch.cat(found, -1), None


@precisely
def gradient(terms: Terms, seed: Tensor, wanted: Sequence[bool]) -> Parts:
    """Equations (1): derivatives with respect to x, W, b, t and ω, None where not wanted."""
    link, (to_x, to_weight, to_bias, to_target, to_omega) = terms.link, wanted
    W = b = None
    X, T = [], []
    # with the state kept nothing is read twice
    kept = terms.state is not None
    each = [(slice(None), _whole(terms))] if kept else _chunks(terms)
    for at, part in each:
        state = _known(part)
        a = times(times(_at(seed, at), part.share), part.omega)
        ar = a * link.residual(state, part.target)
        if to_weight:
            W = plus_sum(W, ar, part.x)
        if to_bias:
            b = plus(b, ar.sum(1))
        if to_x:
            X.append(ar.mT @ part.weight)
        if to_target:
            T.append(a * link.target(state, part.target))
    omega = None
    if to_omega:
        assert terms.losses is not None
        omega = _each(times(seed, terms.share) * terms.losses)
    return _joined(X, 0), W, b, _joined(T, -1), omega


@precisely
def second(terms: Terms, seed: Tensor, along: Parts, wanted: Sequence[bool]) -> Parts:
    """Equations (2): derivatives with respect to x, W, b, t, ω and s, None where not wanted.

    Args:
        terms: what S is made of.
        seed: s.
        along: (ẋ, Ẇ, ḃ, ṫ, ω̇), None where zero.
        wanted: which of x, W, b, t, ω, s.
    """
    fused = _by_kernel(terms, seed, along, wanted)
    if fused is not None:
        return fused
    dtype, link = terms.weight.dtype, terms.link
    dx, dW, db, dt, dω = (
        part if part is None or part.dtype is dtype else part.to(dtype)
        for part in along
    )
    to_x, to_weight, to_bias, to_target, to_omega, to_seed = wanted
    crossed = (dx is not None and to_weight) or (dW is not None and to_x)
    W = b = None
    X, T, omega, S = [], [], [], []
    for at, part in _chunks(terms):
        state, t = _known(part), part.target
        dx_ = None if dx is None else dx[at]
        dt_, dω_ = _rows(dt, at), _rows(dω, at)
        sκ = times(_at(seed, at), part.share)
        a = times(sκ, part.omega)
        u, m, curved = _along(part, state, dx_, dW, db, dt_)
        q = a * curved
        need = dω_ is not None or crossed
        r: Any = link.residual(state, t) if need else None
        if dω_ is not None:
            q = q + (sκ * dω_) * r
        if to_weight:
            W = plus_sum(W, q, part.x)
            if dx_ is not None:
                W = plus_sum(W, a * r, dx_)
        if to_bias:
            b = plus(b, q.sum(1))
        if to_x:
            x = q.mT @ part.weight
            X.append(x if dW is None else x + (a * r).mT @ dW)
        if to_target:
            T.append(_target(part, state, a, sκ, u, dt_, dω_))
        if to_omega:
            omega.append(_each(sκ * m))
        if to_seed:
            S.append(_seed(part, m, dω_))
    S = [part.sum() for part in S] if seed.dim() == 0 else S
    to_s = torch.stack(S).sum() if S and seed.dim() == 0 else _joined(S, -1)
    return _joined(X, 0), W, b, _joined(T, -1), _joined(omega, -1), to_s


def _by_kernel(
    terms: Terms, seed: Tensor, along: Sequence[Tensor | None], wanted: Sequence[bool]
) -> Parts | None:
    """`second` of W, b and ω by a kernel; None where that is not what is asked for."""
    dx, dW, db, dt, dω = along
    to_x, _, _, to_target, to_omega, to_seed = wanted
    state, n, dtype = terms.state, len(terms.x), terms.weight.dtype
    if (
        terms.link.kernel == "torch"
        or state is None
        or dW is None
        or any(part is not None for part in (dx, dt, dω))
        or to_x
        or to_target
        or to_seed
        or seed.shape not in ((), (n,))
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    db = None if db is None else db.to(dtype)
    W, b, omega = hessian_product(
        terms.link, terms.x, dW.to(dtype), db, state, terms.target, seed.to(dtype),
        terms.share, terms.omega, to_omega,
    )  # fmt: skip
    return (
        None,
        W if wanted[1] else None,
        b if wanted[2] else None,
        None,
        omega if to_omega else None,
        None,
    )


def _along(
    part: Terms, state: Tensor, dx: Any, dW: Any, db: Any, dt: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """u, m and ℓ_zz u + ℓ_zt ṫ of a chunk."""
    link, t = part.link, part.target
    u = None
    if dW is not None:
        u = outputs(part.x, dW, db)
    elif db is not None:
        u = db.unsqueeze(1).expand_as(state)
    if dx is not None:
        u = plus(u, part.weight @ dx.mT)
    if u is None:
        u = torch.zeros_like(state)
    m, curved = link.along(state, t, u)
    if dt is not None:
        moved = link.target(state, t) * dt
        m = m + (moved.sum(0) if m.dim() == 1 else moved)
        curved = curved + link.mixed(state, t, dt)
    return u, m, curved


def _target(
    part: Terms, state: Tensor, a: Tensor, sκ: Tensor, u: Tensor, dt: Any, dω: Any
) -> Tensor:
    link, t = part.link, part.target
    curved = link.mixed_transpose(state, t, u)
    if dt is not None:
        curved = curved + link.target_curvature(dt)
    result = a * curved
    return result if dω is None else result + (sκ * dω) * link.target(state, t)


def _seed(part: Terms, m: Tensor, dω: Any) -> Tensor:
    """κ ω∘m + κ ω̇∘ℓ."""
    found = times(m, part.omega)
    if dω is not None:
        assert part.losses is not None
        found = found + dω * part.losses
    return times(found, part.share)


@precisely
def joint(terms: Terms, v: Direction) -> Joint:
    """The loss, its gradient and H v from one visit to x; see `kernels.joint`."""
    link, dtype = terms.link, terms.weight.dtype
    at = Direction(terms.weight, terms.bias)
    v = Direction(v.weight.to(dtype), None if v.bias is None else v.bias.to(dtype))
    if link.kernel != "torch":
        return joint_oracle(
            link, terms.x, at, v, terms.target, terms.share, terms.omega
        )
    # chunks only where outputs are too many
    few = len(terms.x) * len(terms.weight) <= KEEP
    each = [(slice(None), _whole(terms))] if few else _chunks(terms)
    found = [
        joint_of_chunk(link, part.x, at, v, part.target, part.share, part.omega)
        for _, part in each
    ]
    if len(found) == 1:
        return found[0]
    return Joint(
        torch.stack([part.loss for part in found]).sum(),
        torch.cat([part.losses for part in found]),
        torch.cat([part.slopes for part in found]),
        _sum([part.gradient for part in found]),
        _sum([part.product for part in found]),
    )


def _sum(parts: Sequence[Direction]) -> Direction:
    biases = [part.bias for part in parts if part.bias is not None]
    return Direction(
        functools.reduce(torch.add, [part.weight for part in parts]),
        functools.reduce(torch.add, biases) if biases else None,
    )
