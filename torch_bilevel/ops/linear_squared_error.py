"""Squared error of linear outputs:  ℓ = (z − t)²,  r = 2 (z − t),  ℓ_zz u = 2 u."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..kernels.links import SQUARED
from .link import Link
from .reduction import elementwise


@dataclass(frozen=True)
class _Squared(Link):
    """Targets are real numbers, (c, n); the state is z."""

    elementwise = True
    kind = SQUARED
    plain = staticmethod(F.mse_loss)

    def value(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return (z - t).square(), z

    def residual(self, state: Tensor, t: Tensor) -> Tensor:
        return 2 * (state - t)

    def along(self, state: Tensor, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * (state - t) * u, 2 * u

    def target(self, state: Tensor, t: Tensor) -> Tensor:
        return 2 * (t - state)

    def mixed(self, state: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return -2 * v

    def mixed_transpose(self, state: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return -2 * u

    def target_curvature(self, v: Tensor) -> Tensor:
        return 2 * v


def linear_squared_error(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    example_weights: Tensor | None = None,
    reduction: str = "mean",
    kernel: str = "auto",
) -> Tensor:
    """Squared error of ``F.linear(x, weight, bias)`` as one operation.

    The value of ``F.mse_loss(F.linear(x, weight, bias), target)``, each example's loss multiplied
    by ω_i; two derivatives, as `linear_cross_entropy`.

    Args:
        x: features, (n, d).
        weight: (c, d), or (d,) for one output.
        bias: (c,), or 0-d with a weight of shape (d,), or None.
        target: of the shape of the outputs: (n, c) or (n,).
        example_weights: ω, (n,).
        reduction: ``"mean"`` (over examples and outputs), ``"sum"`` or ``"none"``.
        kernel: what computes products with H, see `linear_cross_entropy`.

    Returns:
        The loss, 0-d, or of the shape of the outputs without reduction.

    Raises:
        InvalidLoss: shapes, dtypes or options do not fit.
        KernelUnavailable: the kernel asked for cannot run here.
        NoThirdDerivative: it is differentiated three times.

    Example:
        >>> import torch
        >>> from torch_bilevel.ops import linear_squared_error
        >>> x, w = torch.tensor([[2.0]]), torch.tensor([1.0], requires_grad=True)
        >>> loss = linear_squared_error(x, w, None, torch.tensor([1.0]))
        >>> (g,) = torch.autograd.grad(loss, w, create_graph=True)      # 2 (z − t) x
        >>> g, torch.autograd.grad(g, w)                                # and 2 x²
        (tensor([4.], grad_fn=...), (tensor([8.]),))
    """
    return elementwise(
        "linear_squared_error",
        _Squared, x, weight, bias, target, example_weights, reduction, kernel,
    )  # fmt: skip
