"""What an engine is: a way to compute products with H and J at a point.

    engine   a frozen dataclass of options; ``linearize(problem, calls)`` gives a `Point`
    point    gradient, ``hvp(v)`` = H v, ``cross(v)`` = J v, ``joint(v)`` = both

Laws, asserted by tests over a table of operations: an engine that is not ``approximate`` agrees
with double backward in float64 up to rounding, or raises and names the operation that has no second
derivative; one that is says so in reports.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence, Set
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .._registry import changed, describe
from ..errors import NonSymmetricSystem
from ..problem import (
    BilevelProblem,
    Linearization,
    Point,
    WeightedCall,
    precisions,
)


class Products(abc.ABC):
    """A way to compute products; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    note: ClassVar[str | None] = None  # what reports say of it
    words: ClassVar[str]  # how and at what cost, for `explain`

    @abc.abstractmethod
    def linearize(
        self, problem: BilevelProblem, calls: Sequence[WeightedCall]
    ) -> Point:
        """Products at the present point of Σ w g over recorded calls.

        Args:
            problem: the problem, at the point.
            calls: recorded calls with their weights.
        """

    def __str__(self) -> str:
        return describe(self.name, changed(self))


def disagreement(
    problem: BilevelProblem,
    point: Point,
    calls: Sequence[WeightedCall],
    values: Sequence[Tensor] | None = None,
) -> str | None:
    """What is wrong with a point's products along a random v; None where they are right.

    They are compared with double backward, and ⟨u, H v⟩ with ⟨v, H u⟩.

    Args:
        problem: the problem.
        point: the point.
        calls: recorded calls with their weights.
        values: the parameters there, for a point that keeps its own while they are elsewhere; they
            are overwritten.
    """
    layout = problem.inner.layout
    generator = torch.Generator().manual_seed(0)
    v, u = (
        torch.randn(layout.numel, generator=generator).to(layout.device, layout.dtype)
        for _ in range(2)
    )
    norm = torch.linalg.vector_norm
    found, Hu = point.joint(v), point.hvp(u)
    if values is not None:
        problem.inner.overwrite(values)
    known = problem.linearize(calls).joint(v)
    allowed = max(tolerance(dtype) for dtype in precisions(problem, calls))
    for name, ours, theirs in zip("HJ", found, known, strict=True):
        error, size = float(norm(ours - theirs)), float(norm(theirs))
        if not error <= allowed * size:
            return (
                f"another {name} v than double backward: relative difference "
                f"{error / max(size, 1e-300):.1e}, allowed {allowed:.0e}"
            )
    Hv = found[0]
    defect = float((torch.dot(u, Hv) - torch.dot(v, Hu)).abs())
    if not defect <= allowed * float(norm(u) * norm(Hv) + norm(v) * norm(Hu)):
        return f"products that are not symmetric: ⟨u, H v⟩ − ⟨v, H u⟩ is {defect:.1e}"
    return None


def refuse_maps(engine: Products, calls: Sequence[WeightedCall]) -> None:
    """Refuse fixed points of maps, where products need a transpose.

    Raises:
        NonSymmetricSystem: a call is of a map.
    """
    if any(call.is_map for call, _ in calls):
        raise NonSymmetricSystem(
            "The inner problem is the fixed point of a map, which is not the minimum of a loss, "
            f"and products={str(engine)!r} knows only those: use products='double_backward'."
        )


def tolerance(dtype: torch.dtype) -> float:
    """Agreement asked of an engine, relative in norm."""
    bits = torch.finfo(dtype).bits
    return 1e-9 if bits == 64 else 1e-4 if bits == 32 else 5e-2


def moving(problem: BilevelProblem, v: Tensor, frozen: Set[int]) -> Tensor:
    """The direction v without the parts of parameters that are constants."""
    if not frozen:
        return v
    layout = problem.inner.layout
    return layout.flatten(
        [
            torch.zeros_like(part) if id(tensor) in frozen else part
            for tensor, part in zip(problem.inner.tensors, layout.split(v), strict=True)
        ]
    )


class Substitute(Point):
    """A point without a graph of its own; what only a graph can do, double backward does.

    Its calls are losses, so that H is symmetric: see `refuse_maps`.

    Args:
        problem: the problem, at the point.
        calls: recorded calls with their weights.
    """

    def __init__(self, problem: BilevelProblem, calls: Sequence[WeightedCall]):
        super().__init__(problem)
        self.calls = calls
        self._exact: Linearization | None = None

    @property
    def exact(self) -> Linearization:
        """Double backward at the same point."""
        if self._exact is None:
            self._exact = self.problem.linearize(self.calls)
        return self._exact

    @cached_property
    def gradient(self) -> Tensor:
        """See `Point.gradient`; evaluated when it is asked for, which few estimators do."""
        self.check()
        parts = self.problem.inner_gradients(self.calls, once=True)
        return self.problem.inner.layout.flatten(parts)

    def transpose(self, u: Tensor) -> Tensor:
        """See `Point.transpose`."""
        return self.hvp(u)

    def cross_transpose(self, u: Tensor) -> Tensor:
        """See `Point.cross_transpose`."""
        return self.exact.cross_transpose(u)
