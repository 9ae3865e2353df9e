"""Constraints of outer variables, applied right after every outer step of size β.

    projection      x ← argmin_{z ∈ C} ‖z − x‖          after a step of any outer optimizer
    proximal map    x ← argmin_z ½‖z − x‖² + β h(z)     after a gradient step x − β ∇Φ

A projection is the proximal map of a function that is 0 on C and infinite elsewhere, for every β.
An entry that a projection leaves where it is keeps its bits.

    BilevelOptimizer(inner, outer, constraints="simplex")              every outer tensor
    BilevelOptimizer(inner, outer, constraints=["non_negative", None, tb.Ball(2.0)])    one each

Sums and norms are taken in float64, whatever the dtype.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks, _registry
from ..errors import UnknownName


class Constraint(abc.ABC):
    """A projection or a proximal map; subclasses are frozen dataclasses.

    Attributes:
        name: its name in strings.
        proximal: whether the map depends on the step size, and so needs plain SGD.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class L0(tb.Constraint):                    # h(x) = weight · number of non-zeros
        ...     weight: float
        ...     name, proximal = "l0", True
        ...     def apply(self, tensor, step_size):
        ...         keep = tensor**2 > 2 * step_size * self.weight
        ...         return torch.where(keep, tensor, 0.0)
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> optimizer = tb.BilevelOptimizer(torch.optim.SGD([y], lr=0.1),
        ...     torch.optim.SGD([x], lr=0.1), constraints=L0(0.5))
    """

    name: ClassVar[str]
    proximal: ClassVar[bool] = False

    @abc.abstractmethod
    def apply(self, tensor: Tensor, step_size: float | Tensor) -> Tensor:
        """The projected or proximal point; ``tensor`` itself is left alone.

        Args:
            tensor: an outer variable after the outer step, of any shape.
            step_size: β, the learning rate of its group; a tensor is 0-d.

        Returns:
            A tensor of the same shape and dtype.
        """

    def __str__(self) -> str:
        return _registry.describe(self.name, _registry.changed(self))


# --- projections ----------------------------------------------------------------------


@dataclass(frozen=True)
class NonNegative(Constraint):
    """Projection onto {x ≥ 0}: negative entries become 0.

    Needs: any outer optimizer. Costs: one pass.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> tb.NonNegative().apply(torch.tensor([-1.0, 2.0]), 0.1)
        tensor([0., 2.])
    """

    name: ClassVar[str] = "non_negative"

    def apply(self, tensor: Tensor, step_size: float | Tensor) -> Tensor:
        """See `Constraint.apply`."""
        return torch.where(tensor < 0, 0.0, tensor)


@dataclass(frozen=True)
class Box(Constraint):
    """Projection onto {lower ≤ x ≤ upper}: every entry is clipped.

    Needs: any outer optimizer. Costs: one or two passes.

    Args:
        lower: smallest value; None has no bound.
        upper: largest value; None has no bound.

    Raises:
        ValueError: no bound is given, or none lies between them.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> tb.Box(lower=0, upper=1).apply(torch.tensor([-1.0, 0.5, 2.0]), 0.1)
        tensor([0.0000, 0.5000, 1.0000])
    """

    lower: float | None = None
    upper: float | None = None

    name: ClassVar[str] = "box"

    def __post_init__(self) -> None:
        bounds = [b for b in (self.lower, self.upper) if b is not None]
        numbers = all(
            isinstance(b, (int, float)) and not isinstance(b, bool) and math.isfinite(b)
            for b in bounds
        )
        if not bounds or not numbers or bounds[0] > bounds[-1]:
            raise ValueError(
                f"{self!r}: write one bound or two, finite numbers with lower ≤ upper, such as "
                "Box(lower=0, upper=1)."
            )

    def apply(self, tensor: Tensor, step_size: float | Tensor) -> Tensor:
        """See `Constraint.apply`."""
        if self.lower is not None:
            tensor = torch.where(tensor < self.lower, self.lower, tensor)
        if self.upper is not None:
            tensor = torch.where(tensor > self.upper, self.upper, tensor)
        return tensor


@dataclass(frozen=True)
class Simplex(Constraint):
    """Projection onto {x ≥ 0, Σ x = total} along the last dimension.

        x ← max(x − τ, 0),    τ such that Σ max(x − τ, 0) = total

    By sorting (Held, Wolfe & Crowder 1974; Duchi et al. 2008). A row that is on the simplex up to
    rounding is left as it is.

    Needs: any outer optimizer. Costs: a sort of every row and some copies of it, in float64.

    Args:
        total: what every row sums to.

    Raises:
        ValueError: ``total`` is not positive, or the last dimension is empty.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> tb.Simplex().apply(torch.tensor([[0.5, 0.7, -1.0], [9.0, 0.0, 0.0]]), 0.1)
        tensor([[0.4000, 0.6000, 0.0000],
                [1.0000, 0.0000, 0.0000]])
    """

    total: float = 1.0

    name: ClassVar[str] = "simplex"

    def __post_init__(self) -> None:
        _checks.real("Simplex", "total", self.total, positive=True)

    def apply(self, tensor: Tensor, step_size: float | Tensor) -> Tensor:
        """See `Constraint.apply`."""
        x = torch.atleast_1d(tensor).double()
        if not x.shape[-1]:
            raise ValueError(
                f"{self!r}: a tensor of shape {tuple(tensor.shape)} has no entries in its last "
                "dimension that could sum to a positive number. Give None for this tensor."
            )
        off = (x.sum(-1, keepdim=True) - self.total).abs()
        inside = (off <= _slack(tensor) * self.total) & (x >= 0).all(-1, keepdim=True)
        found = torch.where(inside, x, _onto_simplex(x, self.total))
        return found.to(tensor.dtype).reshape(tensor.shape)


@dataclass(frozen=True)
class Ball(Constraint):
    """Projection onto {‖x‖_p ≤ radius}, the norm of the whole tensor.

    ::

        p = 2:  x ← x · min(1, radius/‖x‖)
        p = 1:  x ← sign(x) ∘ (projection of |x| onto the simplex of that total)

    A tensor that is in the ball up to rounding is left as it is. p = ∞ is
    ``Box(-radius, radius)``.

    Needs: any outer optimizer. Costs: a norm (p = 2), or a sort in float64 (p = 1).

    Args:
        radius: the radius.
        p: 2 or 1.

    Raises:
        ValueError: ``radius`` is not positive, or p is something else.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> tb.Ball(radius=1.0).apply(torch.tensor([3.0, -4.0]), 0.1)
        tensor([ 0.6000, -0.8000])
        >>> tb.Ball(radius=1.0, p=1).apply(torch.tensor([3.0, -4.0]), 0.1)
        tensor([ 0., -1.])
    """

    radius: float
    p: int = 2

    name: ClassVar[str] = "ball"

    def __post_init__(self) -> None:
        _checks.real("Ball", "radius", self.radius, positive=True)
        if self.p not in (1, 2):
            raise ValueError(
                f"{self!r}: p must be 2 or 1. The ball of p = inf is "
                f"Box(lower={-self.radius!r}, upper={self.radius!r})."
            )

    def apply(self, tensor: Tensor, step_size: float | Tensor) -> Tensor:
        """See `Constraint.apply`."""
        norm = torch.linalg.vector_norm(tensor, self.p, dtype=torch.float64)
        inside = norm <= self.radius * (1 + _slack(tensor))
        if self.p == 2 or not tensor.numel():
            found = tensor * (self.radius / norm)
        else:
            sizes = tensor.abs().double().reshape(-1)
            found = _onto_simplex(sizes, self.radius).reshape(tensor.shape)
            found = torch.sign(tensor) * found
        return torch.where(inside, tensor, found.to(tensor.dtype))


# --- proximal maps --------------------------------------------------------------------


@dataclass(frozen=True)
class L1(Constraint):
    """Proximal map of h(x) = weight · ‖x‖₁, the soft threshold: sparse outer variables.

    ::

        x ← sign(x) ∘ max(|x| − β · weight, 0)

    Needs: a plain gradient step, ``outer=torch.optim.SGD(..., lr=β)``. Costs: two passes.

    Args:
        weight: in units of Φ per unit of x; 0 changes nothing.

    Raises:
        ValueError: ``weight`` is negative.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> tb.L1(weight=2.0).apply(torch.tensor([-1.0, 0.125, 0.5]), 0.125)
        tensor([-0.7500,  0.0000,  0.2500])
    """

    weight: float

    name: ClassVar[str] = "l1"
    proximal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.real("L1", "weight", self.weight)

    def apply(self, tensor: Tensor, step_size: float | Tensor) -> Tensor:
        """See `Constraint.apply`."""
        threshold = step_size * self.weight
        moved = tensor - torch.sign(tensor) * threshold
        return torch.where(tensor.abs() <= threshold, 0.0, moved).to(tensor.dtype)


@dataclass(frozen=True)
class Group(Constraint):
    """Proximal map of h(x) = weight · Σ ‖x_g‖₂ (group lasso): whole groups become zero.

        x_g ← x_g · max(1 − β · weight/‖x_g‖, 0)

    One group for every index of the dimensions that are not in ``dim``, as in
    ``torch.linalg.vector_norm(x, dim=dim)``: with ``dim=1`` the rows of a matrix.

    Needs: a plain gradient step, ``outer=torch.optim.SGD(..., lr=β)``. Costs: a norm and a pass.

    Args:
        weight: in units of Φ per unit of x; 0 changes nothing.
        dim: the dimension, or several, over which a group extends.

    Raises:
        ValueError: ``weight`` is negative, ``dim`` is not a dimension, or the tensor lacks it.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> tb.Group(weight=10.0, dim=1).apply(x, 0.1)      # norms 5 and 0.5 become 4 and 0
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
    """

    weight: float
    dim: int | tuple[int, ...]

    name: ClassVar[str] = "group"
    proximal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.real("Group", "weight", self.weight)
        dims = self.dim if isinstance(self.dim, tuple) else (self.dim,)
        if not dims or not all(type(d) is int for d in dims):
            raise ValueError(
                f"{self!r}: dim must be a whole number, or a tuple of them."
            )

    def apply(self, tensor: Tensor, step_size: float | Tensor) -> Tensor:
        """See `Constraint.apply`."""
        try:
            norm = torch.linalg.vector_norm(
                tensor, dim=self.dim, keepdim=True, dtype=torch.float64
            )
        except (IndexError, RuntimeError):
            raise ValueError(
                f"{self!r}: a tensor of shape {tuple(tensor.shape)} has no such dimension. Give "
                "another dim, or None for this tensor."
            ) from None
        threshold = step_size * self.weight
        # not where(norm > threshold): a norm that is not a number must stay one
        factor = torch.where(norm <= threshold, 0.0, 1 - threshold / norm)
        return (tensor * factor).to(tensor.dtype)


REGISTRY: dict[str, type[Constraint]] = {
    cls.name: cls for cls in (NonNegative, Box, Simplex, Ball, L1, Group)
}
"""Name → class."""


def _slack(tensor: Tensor) -> float:
    """How far a sum may be off, relatively: its terms are rounded, and were summed by others."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return torch.finfo(tensor.dtype).eps + 16 * torch.finfo(wide).eps


def _onto_simplex(x: Tensor, total: float) -> Tensor:
    """The nearest point with entries ≥ 0 that sum to ``total``, along the last dimension."""
    # The same for u = x − max x, where τ ≥ −total and no number is larger than the answer needs.
    u = (x - x.amax(-1, keepdim=True)).clamp(min=-total)
    s = u.sort(-1, descending=True).values
    # ρ = max{k : s_k > (Σ_{i≤k} s_i − total)/k},  τ = (Σ_{i≤ρ} s_i − total)/ρ
    excess = s.cumsum(-1) - total
    k = torch.arange(1, s.shape[-1] + 1, dtype=s.dtype, device=s.device)
    active = (s * k > excess) & (s > -total)
    rho = active.sum(-1, keepdim=True).clamp(min=1)  # 0 where x is not a number
    tau = excess.gather(-1, rho - 1) / rho
    found = (u - tau).clamp(min=0)
    return found * (total / found.sum(-1, keepdim=True))


# --- as an argument -------------------------------------------------------------------

_WRITE = (
    "Write a name such as 'simplex' or 'l1(weight=0.1)', an object such as tb.Simplex(), or a "
    "list with one of these, or None, for every outer tensor."
)


def parse(spec: Any) -> Constraint:
    """The constraint that a name, a name with options, or an object stands for.

    Raises:
        UnknownName: no constraint or option has that name, or it is something else.
    """
    if isinstance(spec, Constraint):
        return spec
    if not isinstance(spec, str):
        raise UnknownName(f"constraints= contains {spec!r}, no constraint. {_WRITE}")
    name, options = _registry.parse(
        spec, REGISTRY, "constraint", "box(lower=0, upper=1)"
    )
    return _registry.build(REGISTRY[name], options, name)
