"""The inner loss differentiated once at a point: gradient and any number of products.

With G(x, y) = ∇_y Σ w g and its graph kept, one backward pass gives

    hvp(v)   = H v = ∂_y⟨G, v⟩        cross(v) = J v = ∂_x⟨G, v⟩
    joint(v) = (H v, J v)              from a single pass

at about one gradient's cost each. Point and randomness (dropout) are frozen while it lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._vector import Layout
from .point import Point
from .variables import gradients, pulled

if TYPE_CHECKING:
    from .problem import BilevelProblem


class Linearization(Point):
    """Products with H and J by differentiating a kept graph of ∇_y g.

    Args:
        problem: the problem, for layouts and the point.
        parts: ∇_y g per inner parameter with graph, None where not reached.
        outer_parts: ∇_x g per outer tensor with graph, for tangents.
        reusable: the graph outlives `add_joint`.
        symmetric: the parts are a gradient; for the residual of a map, H stands for (∂_y G)ᵀ and
            J for (∂_x G)ᵀ.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        parts: Sequence[Tensor | None],
        outer_parts: Sequence[Tensor | None] = (),
        reusable: bool = False,
        symmetric: bool = True,
    ):
        super().__init__(problem, symmetric)
        self.parts = list(parts)
        self.outer_parts = list(outer_parts)
        self.reusable = reusable
        self._live = [
            index
            for index, part in enumerate(self.parts)
            if part is not None and part.requires_grad
        ]

    @property
    def gradient(self) -> Tensor:
        """∇_y g as a flat vector, detached."""
        return self.problem.inner.layout.flatten(
            [None if part is None else part.detach() for part in self.parts]
        )

    def transpose(self, u: Tensor) -> Tensor:
        """See `Point.transpose`; two passes where H ≠ Hᵀ."""
        if self.symmetric:
            return self.hvp(u)
        problem = self.problem
        return self._transposed(u, problem.inner.layout, problem.inner.tensors)

    def cross_transpose(self, u: Tensor) -> Tensor:
        """See `Point.cross_transpose`; two passes."""
        problem = self.problem
        return self._transposed(u, problem.outer.layout, problem.direct)

    def _transposed(
        self, u: Tensor, layout: Layout, variables: Sequence[Tensor | None]
    ) -> Tensor:
        """∂_w⟨∂⟨G, w⟩, u⟩, the inner derivative with respect to some variables."""
        self.begin()
        inner = self.problem.inner.layout
        live = [part for part in self.parts if part is not None and part.requires_grad]
        if not live:
            return inner.zeros()
        weights = [torch.zeros_like(part, requires_grad=True) for part in live]
        (rows,) = gradients(
            live, weights, variables, retain_graph=True, create_graph=True
        )
        pairs = [
            (row, part)
            for row, part in zip(rows, layout.split(u), strict=True)
            if row is not None and row.requires_grad
        ]
        result: list[Tensor | None] = [None] * len(self.parts)
        if pairs:
            (found,) = gradients(
                [row for row, _ in pairs], [part for _, part in pairs], weights
            )
            for index, part in zip(self._live, found, strict=True):
                result[index] = part
        return inner.flatten(result)

    def add_joint(self, v: Tensor, inner: Tensor, outer: Tensor) -> None:
        """Add H v to ``inner`` and J v to ``outer``, both flat, in place.

        It is the last product: the graph is freed as the pass goes, unless it is ``reusable``.
        """
        self.begin()
        last = not self.reusable
        to_inner, to_outer = self._parts(v, inner=True, outer=True, last=last)
        self.problem.inner.layout.add(inner, to_inner)
        self.problem.outer.layout.add(outer, to_outer)

    @property
    def outer_reached(self) -> list[bool]:
        """Per outer tensor, whether g depends on it; with ``outer_parts``."""
        return [part is not None for part in self.outer_parts]

    def tangent(self, v: Tensor, e: Tensor) -> Tensor:
        """H v + Jᵀ e = ∂_y(⟨∇_y g, v⟩ + ⟨∇_x g, e⟩), flat; with ``outer_parts``.

        Args:
            v: flat, of the inner layout.
            e: flat, of the outer layout.
        """
        self.begin()
        layouts = self.problem.inner.layout, self.problem.outer.layout
        weights = [*layouts[0].split(v), *layouts[1].split(e)]
        (found,) = pulled(
            [*self.parts, *self.outer_parts],
            weights,
            self.problem.inner.tensors,
            retain_graph=True,
        )
        return layouts[0].flatten(found)

    def product(self, v: Tensor, inner: bool, outer: bool) -> tuple[Tensor, Tensor]:
        """See `Point.product`."""
        return self.flat(*self._parts(v, inner, outer), inner, outer)

    def _parts(
        self, v: Tensor, inner: bool, outer: bool, last: bool = False
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        problem = self.problem
        to_inner: list[Tensor | None] = [None] * len(problem.inner.tensors)
        to_outer: list[Tensor | None] = [None] * len(problem.outer.tensors)
        if self._live:
            weights = problem.inner.layout.split(v)
            found = gradients(
                [self.parts[index] for index in self._live],  # type: ignore[misc]
                [weights[index] for index in self._live],
                problem.inner.tensors if inner else (),
                problem.direct if outer else (),
                retain_graph=not last,
            )
            to_inner, to_outer = found[0] or to_inner, found[1] or to_outer
        if outer:
            self.reach(to_outer)
        return to_inner, to_outer
