"""Forward over reverse: the tangent, along v, of one backward pass.

    H v = d/dε ∇_y g(x, y + εv),      J v = d/dε ∇_x g(x, y + εv)       at ε = 0

The textbook's choice and, in eager PyTorch, two to ten times slower than double backward on a kept
graph and with more memory; several losses have no forward derivative of their backward. For
comparison, and for a single product per point.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import NoSecondDerivative
from ..problem import BilevelProblem, WeightedCall, added, by_frozen
from .base import (
    Products,
    Substitute,
    disagreement,
    moving,
    refuse_maps,
)


@dataclass(frozen=True)
class ForwardOverReverse(Products):
    """The tangent of a backward pass.

    Needs: operations whose backward has a forward derivative; fewer than have a second derivative.
    Costs: forward and backward anew in every product, with tangents. The first product of every
    loss is checked against double backward.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.ForwardOverReverse())
        'forward_over_reverse'
    """

    name: ClassVar[str] = "forward_over_reverse"
    words: ClassVar[str] = (
        "forward over reverse, evaluated anew in every product (slow)"
    )

    def linearize(
        self, problem: BilevelProblem, calls: Sequence[WeightedCall]
    ) -> TangentPoint:
        """See `Products.linearize`.

        Raises:
            NonSymmetricSystem: the inner problem is the fixed point of a map.
            NoSecondDerivative: the products are not those of double backward.
        """
        refuse_maps(self, calls)
        point = TangentPoint(problem, calls)
        for call, _ in calls:
            key = self, id(call.function)
            if key in problem.recorded:
                continue
            wrong = disagreement(
                problem, TangentPoint(problem, [(call, 1.0)]), [(call, 1.0)]
            )
            if wrong is not None:
                raise NoSecondDerivative(
                    f"products='forward_over_reverse' gives {wrong}, in {call.name!r}: PyTorch's "
                    "forward derivative of the backward of one of its operations is wrong "
                    "(torch.linalg.solve and det, in torch 2.13). The way round: "
                    "products='double_backward'."
                )
            problem.recorded[key] = call.function
        return point


class TangentPoint(Substitute):
    """Products as tangents of gradients."""

    def product(self, v: Tensor, inner: bool, outer: bool) -> tuple[Tensor, Tensor]:
        """See `Point.product`.

        Raises:
            NoSecondDerivative: an operation has no forward derivative of its backward.
        """
        problem = self.problem
        count = len(problem.inner.tensors)
        tangents: list[Tensor | None] = []
        for frozen, calls in by_frozen(self.calls):
            w = moving(problem, v, frozen)
            with forward_ad.dual_level(), self._moving(w), torch.enable_grad():
                found = problem.inner_gradients(calls, outer=outer)
                parts = [
                    None if part is None else forward_ad.unpack_dual(part).tangent
                    for part in found
                ]
            if outer:
                self.reach(found[count:])
            tangents = added(tangents, parts)
        return self.flat(tangents[:count], tangents[count:], inner, outer)

    @contextlib.contextmanager
    def _moving(self, v: Tensor) -> Iterator[None]:
        """The live parameters carry the tangent v; values, versions and graphs stay."""
        problem = self.problem
        with contextlib.ExitStack() as stack:
            parts = problem.inner.layout.split(v)
            for tensor, part in zip(problem.inner.tensors, parts, strict=True):
                stack.enter_context(
                    torch.autograd._unsafe_preserve_version_counter(tensor)
                )
                with torch.no_grad():
                    tensor.copy_(forward_ad.make_dual(tensor.detach().clone(), part))
            yield
