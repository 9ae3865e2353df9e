"""Hypergradients that nothing differentiates: the losses are recorded once, for all lanes.

    Σ_lanes f ↦ ∂_y f, ∂_x f        Σ_lanes g ↦ ∇_y g ↦ H u and J u, with one recording of ∇_y g

A lane depends on its own y and x alone, so derivatives of the sum are those of every lane. Only the
losses themselves pass through ``vmap``, and their derivatives are taken below it, by operations
that see all lanes as one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..solvers import Operator, Solver
from .equations import numbers
from .levels import batches, lanes
from .matrices import Below, lanes_at, with_lanes

Value = Callable[..., Tensor]  # (y, x, *tensors), a number, or one for each lane


class Derivatives(NamedTuple):
    """Those of both losses at a point that a hypergradient is made of.

    Attributes:
        loss: f.
        outer_y: ∂_y f.
        outer_x: ∂_x f.
        curvature: u ↦ (H + δ) u.
        mixed: u ↦ J u.
    """

    loss: Tensor
    outer_y: Tensor
    outer_x: Tensor
    curvature: Callable[[Tensor], Tensor]
    mixed: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TwoLosses:
    """Two losses and a solver; see `hypergradients` for the formulas.

    Attributes:
        inner: g.
        outer: f.
        solver: a linear solver.
        damping: δ.
    """

    inner: Value
    outer: Value
    solver: Solver
    damping: float

    def of_lanes(self, dims: Sequence[int | None], randomness: str) -> TwoLosses:
        """The same for many points at once; y and x along their first dimension."""
        inner, outer = (
            torch.func.vmap(loss, in_dims=(0, 0, *dims), randomness=randomness)
            for loss in (self.inner, self.outer)
        )
        return replace(self, inner=inner, outer=outer)

    def derivatives(self, y: Tensor, x: Tensor, *tensors: Tensor) -> Derivatives:
        """Evaluate both losses, and record the gradient of one."""
        y, x = (part.detach().requires_grad_() for part in (y, x))
        with torch.enable_grad():
            loss = self.outer(y, x, *tensors)
            f_y, f_x = _derivative(loss.sum(), (y, x))
            g = self.inner(y, x, *tensors).sum()
            (g_y,) = _derivative(g, (y,), recorded=True)

        def curvature(u: Tensor) -> Tensor:
            (Hu,) = _derivative(g_y, (y,), u)
            return Hu + self.damping * u if self.damping else Hu

        return Derivatives(
            loss.detach(), f_y, f_x, curvature, lambda u: _derivative(g_y, (x,), u)[0]
        )

    def solve(self, y: Tensor, x: Tensor, start: Tensor, *tensors: Tensor) -> Any:
        """∇Φ, f, v and the numbers of the solve; without a start if it is empty."""
        return _AllLanes.apply(self, TwoLosses._solve, y, x, start, *tensors)

    def _solve(self, y: Tensor, x: Tensor, start: Tensor, *tensors: Tensor) -> Any:
        at = self.derivatives(y, x, *tensors)
        operator = Operator(at.curvature, y.shape[-1])
        x0 = start if self.solver.uses_start and start.numel() else None
        found = self.solver.solve(operator, at.outer_y, x0)
        gradient = at.outer_x - at.mixed(found.value)
        return gradient, at.loss, found.value, numbers(found)

    def products(self, y: Tensor, x: Tensor, u: Tensor, *tensors: Tensor) -> Any:
        """f, ∂_y f, ∂_x f, (H + δ) u and J u."""
        return _AllLanes.apply(self, TwoLosses._products, y, x, u, *tensors)

    def _products(self, y: Tensor, x: Tensor, u: Tensor, *tensors: Tensor) -> Any:
        at = self.derivatives(y, x, *tensors)
        return *at[:3], at.curvature(u), at.mixed(u)

    def products_by_transforms(
        self, y: Tensor, x: Tensor, u: Tensor, *tensors: Tensor
    ) -> Any:
        """The same under the transforms that are active, each of which sees every operation."""
        y = with_lanes(y, (x, *tensors))
        x, u = with_lanes(x, (y,)), with_lanes(u, (y,))
        g_y = torch.func.grad(self.inner)
        H_and_J = torch.func.vjp(lambda y, x: g_y(y, x, *tensors), y, x)[1]
        Hu, Ju = H_and_J(u)
        return *self.outer_by_transforms(y, x, *tensors), Hu + self.damping * u, Ju

    def outer_by_transforms(
        self, y: Tensor, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """f, ∂_y f and ∂_x f, differentiable."""
        f, pull = torch.func.vjp(lambda y, x: self.outer(y, x, *tensors), y, x)  # type: ignore[misc]
        return f, *pull(torch.ones_like(f))


def _derivative(
    of: Tensor,
    operands: tuple[Tensor, ...],
    along: Tensor | None = None,
    recorded: bool = False,
) -> tuple[Tensor, ...]:
    """Zero where nothing depends on an operand."""
    if not of.requires_grad:
        return tuple(torch.zeros_like(operand) for operand in operands)
    return torch.autograd.grad(
        of,
        operands,
        along,
        retain_graph=True,
        create_graph=recorded,
        materialize_grads=True,
    )


class _AllLanes(Below):
    """What two losses give, of all lanes at once."""

    @staticmethod
    def forward(
        losses: TwoLosses, work: Any, y: Tensor, x: Tensor, w: Tensor, *tensors: Tensor
    ) -> Any:  # type: ignore[override]
        return work(losses, y, x, w, *tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, losses: TwoLosses, work: Any, *given: Any) -> Any:  # type: ignore[override]
        """One level less."""
        y, x, w = (
            lanes_at(tensor, dim, 0, info.batch_size)
            for tensor, dim in zip(given[:3], in_dims[2:5], strict=True)
        )
        of_all = losses.of_lanes(in_dims[5:], info.randomness)
        found = _AllLanes.apply(of_all, work, y, x, w, *given[3:])
        return found, (0,) * len(found)


def fits_in_lanes(y: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether every lane has a y or data of its own, and x has, or is small enough to be given one.

    A large x is better shared by the lanes, as the losses read it. A ``vmap`` of which nothing has
    lanes would not be seen below it, nor what it says of random numbers.
    """
    own = {level for tensor in (y, *tensors) for level in batches(tensor)}
    if lanes() != own | batches(x):
        return False
    return own <= batches(x) or x.numel() <= 2 * y.numel()
