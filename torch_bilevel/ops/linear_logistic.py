"""Logistic loss of linear outputs, in the numerically stable form.

ℓ = max(z, 0) − z t + log(1 + e^{−|z|}),    r = σ(z) − t,    ℓ_zz u = σ(1 − σ) u
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..kernels.links import LOGISTIC
from .link import Link
from .reduction import elementwise


@dataclass(frozen=True)
class _Logistic(Link):
    """Targets are probabilities of each output, (c, n); the state is z."""

    elementwise = True
    kind = LOGISTIC
    plain = staticmethod(F.binary_cross_entropy_with_logits)

    def value(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return -F.logsigmoid(-z) - z * t, z

    def residual(self, state: Tensor, t: Tensor) -> Tensor:
        return state.sigmoid() - t

    def along(self, state: Tensor, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        p = state.sigmoid()
        return (p - t) * u, p * state.neg().sigmoid() * u

    def target(self, state: Tensor, t: Tensor) -> Tensor:
        return -state

    def mixed(self, state: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return -v

    def mixed_transpose(self, state: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return -u


def linear_logistic(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    example_weights: Tensor | None = None,
    reduction: str = "mean",
    kernel: str = "auto",
) -> Tensor:
    """Logistic loss of ``F.linear(x, weight, bias)`` as one operation.

    The value of ``F.binary_cross_entropy_with_logits(F.linear(x, weight, bias), target)``, each
    example's loss multiplied by ω_i; two derivatives, as `linear_cross_entropy`.

    Args:
        x: features, (n, d).
        weight: (c, d) for c independent outputs, or (d,) for one.
        bias: (c,), or 0-d with a weight of shape (d,), or None.
        target: probabilities in [0, 1], of the shape of the outputs: (n, c) or (n,).
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
        >>> from torch_bilevel.ops import linear_logistic
        >>> x, w = torch.tensor([[1.0], [-1.0]]), torch.zeros(1, requires_grad=True)
        >>> loss = linear_logistic(x, w, None, torch.tensor([1.0, 0.0]))
        >>> torch.autograd.grad(loss, w)        # mean of (σ(0) − t) x
        (tensor([-0.5000]),)
    """
    return elementwise(
        "linear_logistic",
        _Logistic, x, weight, bias, target, example_weights, reduction, kernel,
    )  # fmt: skip
