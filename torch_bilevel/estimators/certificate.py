"""A bound on the error of an implicit hypergradient, from what was computed (a posteriori).

With e = ‖∇_y g(x, y)‖/μ ≥ ‖y − y*‖ and r = ‖∂_y f − H v‖, for g μ-strongly convex in y,

    ‖ĝ − ∇Φ‖ ≤ ‖J‖ r/μ + e (L_B ‖∂_y f‖/μ + (‖J‖ + L_B e)(L_H ‖∂_y f‖/μ² + L_f/μ)) + L_fx e

where L_H, L_B, L_f, L_fx are the Lipschitz constants in y of ∇²_yy g, ∇²_xy g, ∂_y f and ∂_x f. For
L_H = 0 these are the terms of Ehrhardt & Roberts (2024); whatever y and v come from, it holds.
‖J‖/μ is pessimistic where J's largest singular value belongs to a direction of large curvature.
With few inner parameters S = ‖J H⁻¹‖ at y takes its place,

    ‖ĝ − ∇Φ‖ ≤ S (r + L_f e) + e (S L_H + L_B) (‖∂_y f‖ + L_f e)/μ + L_fx e

with e = ‖H⁻¹ ∇_y g‖ where L_H = 0; the smaller of the two is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BilevelError
from ..problem import OuterGradients, Point
from .base import Situation
from .system import System

EXACT = 64  # up to so many rows or columns ‖J‖ is computed, beyond it is iterated


@dataclass(frozen=True)
class Smoothness:
    """Constants of the two losses at the present outer variables, for ``certify=True``.

    Numbers or 0-d tensors. They may be larger than the true ones (μ: smaller); the bound is then
    larger, and true.

    Args:
        strong_convexity: μ of g in y, weight decay included.
        hessian: L_H of ∇²_yy g; 0 for a quadratic.
        cross: L_B of ∇²_xy g.
        outer: L_f of ∂_y f.
        outer_cross: L_fx of ∂_x f; 0 where ∂_x f does not depend on y.

    Example:
        >>> import torch_bilevel as tb
        >>> tb.Smoothness(strong_convexity=0.1, outer=2.0).hessian
        0.0
    """

    strong_convexity: Any
    hessian: Any = 0.0
    cross: Any = 0.0
    outer: Any = 0.0
    outer_cross: Any = 0.0


def bound(
    situation: Situation,
    at: System,
    outer: OuterGradients,
    v: Tensor,
    Jv: Tensor,
) -> Tensor:
    """The bound of the module's formula, 0-d.

    Args:
        situation: problem, and the declared constants.
        at: the system v was solved for.
        outer: ∂_y f and ∂_x f.
        v: the adjoint.
        Jv: what was subtracted from ∂_x f; its difference from J v of ``at`` is added.

    Returns:
        The bound; about two products and ‖J‖, and a joint product for every inner parameter where
        there are at most `EXACT`.

    Raises:
        BilevelError: no constants were declared, μ is not positive, or outer variables enter beside
            the registered losses.
    """
    declared = situation.loop.smoothness
    if declared is None:
        raise BilevelError(
            "certify=True needs constants of the losses. Register a function that returns them at "
            "the present outer variables: @optimizer.smoothness above def constants(): return "
            "tb.Smoothness(strong_convexity=..., hessian=..., cross=..., outer=...)."
        )
    if situation.products.note is not None:
        raise BilevelError(
            f"certify=True bounds the error of exact products, and products="
            f"{str(situation.products)!r} are approximate. Use 'double_backward' or 'traced'."
        )
    loop, like = situation.loop, outer.inner
    if loop.hyperparameters is not None or (
        loop.proximal and situation.problem.initial
    ):
        raise BilevelError(
            "certify=True knows how the outer variables enter the registered losses, and here they "
            "also set the weight decay or the point of a proximal term, of which the bound would "
            "know nothing. Write that term into the inner loss, or leave certify out."
        )
    with torch.no_grad():
        found = declared()
        if not isinstance(found, Smoothness):
            raise BilevelError(
                f"The function registered with @optimizer.smoothness returned "
                f"{type(found).__name__}. Return tb.Smoothness(strong_convexity=..., hessian=..., "
                "cross=..., outer=...)."
            )
        mu, L_H, L_B, L_f, L_fx = (
            torch.as_tensor(value, dtype=like.dtype, device=like.device)
            for value in (
                found.strong_convexity,
                found.hessian,
                found.cross,
                found.outer,
                found.outer_cross,
            )
        )
    if mu.numel() != 1 or not all(c.numel() == 1 for c in (L_H, L_B, L_f, L_fx)):
        raise BilevelError(
            "Smoothness(...): the constants are numbers, and a tensor with several entries was "
            "given. Take the smallest strong_convexity and the largest of the others."
        )
    if not bool(mu > 0):
        raise BilevelError(
            f"Smoothness(strong_convexity={float(mu):.3g}): the bound needs an inner loss that is "
            "strongly convex, μ > 0."
        )
    norm = torch.linalg.vector_norm
    e = norm(at.residual) / mu
    r = norm(like - (at.product(v) - at.damping * v))
    J, b = cross_norm(at.linearization), norm(like)
    implicit = L_B * b / mu + (J + L_B * e) * (L_H * b / mu**2 + L_f / mu)
    found = J * r / mu + e * implicit + L_fx * e
    if len(like) <= EXACT:
        identity = torch.eye(len(like)).to(like)
        pairs = [at.joint(u) for u in identity]
        wide = torch.promote_types(like.dtype, torch.float32)  # what LAPACK knows
        H = (torch.stack([H for H, _ in pairs], 1) - at.damping * identity).to(wide)
        cross = torch.stack([J for _, J in pairs], 1).to(wide)
        solve = torch.linalg.solve_ex  # a singular H gives inf or NaN, and no error
        S = torch.linalg.matrix_norm(solve(H, cross, left=False)[0], 2).to(like)
        if not bool(L_H):
            e = norm(solve(H.T, at.residual.to(wide))[0]).to(like)
        curved = (S * L_H + L_B) * (b + L_f * e) / mu
        found = torch.fmin(found, S * (r + L_f * e) + e * curved + L_fx * e)
    return found + norm(Jv - at.cross(v))  # J v was averaged over other batches


def cross_norm(at: Point, max_steps: int = 50) -> Tensor:
    """‖J‖, the spectral norm: exact for few rows or columns, else power iteration plus 2 %.

    Beyond `EXACT` rows and columns it is an estimate: power iteration comes from below, and where
    the largest singular values lie close together it may stop short by more than 2 %.
    """
    inner, outer = at.problem.inner.layout, at.problem.outer.layout
    if min(inner.numel, outer.numel) <= EXACT:
        by_rows = outer.numel <= inner.numel
        basis = torch.eye(
            outer.numel if by_rows else inner.numel, dtype=inner.dtype
        ).to(inner.device)
        apply = at.cross_transpose if by_rows else at.cross
        return torch.linalg.matrix_norm(torch.stack([apply(u) for u in basis]), 2)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(outer.numel, generator=generator).to(outer.device, outer.dtype)
    u, value = u / torch.linalg.vector_norm(u), u.new_zeros(())
    for _ in range(max_steps):
        w = at.cross(at.cross_transpose(u))
        before, value = value, torch.linalg.vector_norm(w)
        u = torch.where(value > 0, w / value, u)
        if bool((value - before).abs() <= 1e-3 * value):
            break
    return 1.02 * value.sqrt()
