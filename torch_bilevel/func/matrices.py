"""Jacobians known by their products, recorded once for all lanes of ``vmap``.

A solver multiplies one matrix with many vectors. Under ``vmap`` each of these products would pass
through every operation of the model with a lane dimension attached and taken off again. Instead the
gradient is recorded once below the transform, as a plain function of all lanes, and a product is
one pass over that record: half the time for 32 small heads.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..solvers import normal, transformed
from .levels import batches, every

Product = Callable[[Tensor], Tensor]


class Matrix(abc.ABC):
    """A square matrix A(θ) by its products.

    Attributes:
        symmetric: whether A = Aᵀ.
    """

    symmetric: bool

    @abc.abstractmethod
    def product(self, v: Tensor, *theta: Tensor) -> Tensor:
        """A v, differentiable."""

    @abc.abstractmethod
    def transposed(self, v: Tensor, *theta: Tensor) -> Tensor:
        """Aᵀ v, differentiable."""

    def linearised(self, *theta: Tensor) -> tuple[Product, Product]:
        """The maps v ↦ A v and v ↦ Aᵀ v for many v, without derivative."""
        return (
            lambda v: self.product(v, *theta),
            lambda v: self.transposed(v, *theta),
        )


@dataclass
class Trust:
    """Whether what is computed below ``vmap`` is what ``vmap`` itself gives.

    It is, but where PyTorch batches a second derivative wrongly: in torch 2.13 those of
    ``layer_norm``, ``batch_norm`` and ``instance_norm`` with a batched weight, where the gradient
    is taken inside of ``vmap`` and its derivative outside. So both are computed once for every
    function and every choice of what is batched.
    """

    below: dict[Any, bool] = field(default_factory=dict)

    def check(
        self,
        what: str,
        theta: Sequence[Tensor],
        fast: Callable[[Tensor], Sequence[Tensor]],
        slow: Callable[[Tensor], Sequence[Tensor]],
    ) -> bool:
        """Whether two ways to products along a direction like θ[0] agree.

        Args:
            what: is compared; asked once for every choice of what is batched.
            theta: where.
            fast: the products below ``vmap``.
            slow: the same by ``vmap``.
        """
        key = (what, *(len(batches(tensor)) for tensor in theta))
        if key not in self.below:
            y = theta[0]
            probe = normal(y.shape[-1]).to(y.device, y.dtype).expand_as(y)
            tolerance = torch.finfo(y.dtype).eps ** 0.5
            pairs = list(zip(fast(probe), slow(probe), strict=True))
            pairs = [(every(a - b), every(b)) for a, b in pairs if b.numel()]
            if not all(torch.isfinite(b).all() for _, b in pairs):
                return False  # which says nothing of other points
            self.below[key] = all(
                off.abs().amax() <= tolerance * b.abs().amax() for off, b in pairs
            )
        return self.below[key]


class Jacobian(Matrix):
    """The derivative of ``function(y, *rest)`` with respect to y, with θ = (y, *rest).

    Reverse over reverse: Aᵀ u is a backward pass, and A v one more through it.

    Args:
        function: of flat vectors y, of the size of y.
        symmetric: it is a gradient.
        trust: shared by all Jacobians of the same function.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        symmetric: bool,
        trust: Trust | None = None,
    ):
        self.function = function
        self.symmetric = symmetric
        self.trust = trust or Trust()

    def trusted(self, *theta: Tensor) -> bool:
        """Whether to record below the transforms that are active."""
        y, *rest = theta
        lanes = with_lanes(y, rest)
        return self.trust.check(
            "the products",
            theta,
            lambda u: [Record(self.function, y, rest, below=True)(u)],
            lambda u: [self.transposed(with_lanes(u, [lanes]), lanes, *rest)],
        )

    def product(self, v: Tensor, *theta: Tensor) -> Tensor:
        """See `Matrix.product`."""
        if self.symmetric:
            return self.transposed(v, *theta)
        back = torch.func.vjp(lambda u: self.transposed(u, *theta), torch.zeros_like(v))
        return back[1](v)[0]

    def transposed(self, v: Tensor, *theta: Tensor) -> Tensor:
        """See `Matrix.transposed`."""
        y, *rest = theta
        return torch.func.vjp(lambda y: self.function(y, *rest), y)[1](v)[0]

    def of_lanes(self, dims: Sequence[int | None], randomness: str) -> Jacobian:
        """The same for many points at once, y along its first dimension and the rest along dims."""
        function = torch.func.vmap(
            self.function, in_dims=(0, *dims), randomness=randomness
        )
        return Jacobian(function, self.symmetric, self.trust)

    def linearised(self, *theta: Tensor) -> tuple[Product, Product]:
        """See `Matrix.linearised`."""
        if torch.compiler.is_compiling() and not transformed():
            # the body of a compiled loop is a program of its own and cannot read a record
            return super().linearised(*theta)
        y, *rest = theta
        below = transformed() and not torch.compiler.is_compiling()
        below = below and self.trusted(*theta)
        y = with_lanes(y, rest)
        transposed = Record(self.function, y, rest, below)
        if self.symmetric:
            return transposed, transposed
        made: list[Product] = []

        def product(v: Tensor) -> Tensor:
            if not made:  # a solver may need only one of the two
                made.append(Record(self.transposed, torch.zeros_like(v), theta, below))
            return made[0](v)

        return product, transposed


class Record:
    """The map u ↦ (∂function/∂y)ᵀ u at a point, from one recording; without derivative.

    Args:
        function: ``function(y, *rest)``.
        y: where.
        rest: what else it depends on.
        below: record below the transforms that are active, of all lanes at once.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        y: Tensor,
        rest: Sequence[Tensor],
        below: bool,
    ):
        self.function = function
        self.pull: Callable[[Tensor], Any] | None = None
        self.lanes: Record | None = None
        self.like = y
        self.mark: Tensor | None = None  # has a lane wherever the record has
        if below:
            self.mark = _Recording.apply(self, y, *rest)  # type: ignore[assignment]
        else:
            self.record(y, rest)

    def record(self, y: Tensor, rest: Sequence[Tensor]) -> None:
        """Run the function."""
        self.like = y
        self.pull = torch.func.vjp(lambda y: self.function(y, *rest), y)[1]

    def __call__(self, u: Tensor, more: int = 0) -> Tensor:
        """A product; of many vectors at once, where ``more`` dimensions precede them."""
        if self.mark is not None:
            return _Product.apply(self, more, u, self.mark)  # type: ignore[return-value]
        return self.product(u, more)

    def product(self, u: Tensor, more: int) -> Tensor:
        """A product at the level of the record."""
        pull = self.pull
        assert pull is not None
        u = with_lanes(u, [self.like])
        for _ in range(more):
            pull = torch.func.vmap(pull)
        return pull(u)[0]


class Below(torch.autograd.Function):
    """A function that is run below the transforms that are active.

    It has no derivative and is asked for none: solvers run where nothing is differentiated.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""


class _Recording(Below):
    """Makes a record at the lowest level; what it returns has the lanes of the record."""

    @staticmethod
    def forward(record: Record, y: Tensor, *rest: Tensor) -> Tensor:  # type: ignore[override]
        record.record(y, rest)
        return y.new_zeros(())

    @staticmethod
    def vmap(info: Any, in_dims: Any, record: Record, y: Tensor, *rest: Tensor) -> Any:  # type: ignore[override]
        """One record for all lanes."""
        _, dim, *dims = in_dims
        function = torch.func.vmap(
            record.function, in_dims=(0, *dims), randomness=info.randomness
        )
        y = lanes_at(y, dim, 0, info.batch_size)
        record.lanes = Record(function, y, rest, below=transformed())
        mark = record.lanes.mark
        mark = y.new_zeros(()) if mark is None else mark
        return mark.expand(info.batch_size), 0


class _Product(Below):
    """A product of a record."""

    @staticmethod
    def forward(record: Record, more: int, u: Tensor, mark: Tensor) -> Tensor:  # type: ignore[override]
        return record.product(u, more)

    @staticmethod
    def vmap(info: Any, in_dims: Any, record: Record, more: int, u: Any, mark: Any):  # type: ignore[override]
        """Of all lanes at once, or of more vectors where the record has no lane."""
        _, _, dim, recorded = in_dims
        if recorded is None:
            return _Product.apply(record, more + 1, u.movedim(dim, 0), mark), 0
        assert record.lanes is not None
        return record.lanes(lanes_at(u, dim, more, info.batch_size), more), more


def lanes_at(tensor: Tensor, dim: int | None, at: int, count: int) -> Tensor:
    """The tensor with a dimension of lanes in a certain place."""
    if dim is not None:
        return tensor.movedim(dim, at)
    shape = list(tensor.shape)
    shape.insert(at, count)
    return tensor.unsqueeze(at).expand(shape)


def with_lanes(b: Tensor, rest: Sequence[Tensor]) -> Tensor:
    """The tensor with a lane wherever others have one, for what is written into without copying."""
    if not transformed():
        return b
    for tensor in rest:
        if tensor.numel():
            other = tensor.reshape(-1)[0].to(b.dtype)
            b = torch.where(torch.zeros_like(other, dtype=torch.bool), other, b)
    return b
