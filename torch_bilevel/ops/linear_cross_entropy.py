"""Cross-entropy of linear outputs.

    ℓ = log Σ_k exp z_k − z_t,    r = p − e_t,    ℓ_zz u = p∘u − p⟨p, u⟩,    p = softmax(z)

With label smoothing ε, e_t becomes (1 − ε) e_t + ε/c; with class probabilities t,
ℓ = Σt · log Σ exp z − ⟨t, z⟩.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InvalidLoss
from ..kernels.links import SOFTMAX
from .fused import resolve
from .link import Link
from .reduction import (
    as_written,
    check,
    check_tensors,
    loss_of,
    plain_loss,
    real_target,
)


@dataclass(frozen=True)
class _Indices(Link):
    """Targets are class indices; those ignored were replaced by 0."""

    smoothing: float = 0.0  # type: ignore[misc]

    kind = SOFTMAX

    def value(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(z, 0)
        return self._losses(logp, t), logp.exp()

    def losses(self, z: Tensor, t: Tensor) -> Tensor:
        return self._losses(torch.log_softmax(z, 0), t)

    def _losses(self, logp: Tensor, t: Tensor) -> Tensor:
        loss = -logp.gather(0, t.unsqueeze(0)).squeeze(0)
        if self.smoothing:
            loss = (1 - self.smoothing) * loss - self.smoothing * logp.mean(0)
        return loss

    def residual(self, state: Tensor, t: Tensor) -> Tensor:
        one = torch.full_like(t, self.smoothing - 1, dtype=state.dtype).unsqueeze(0)
        r = state.scatter_add(0, t.unsqueeze(0), one)
        return r - self.smoothing / len(state) if self.smoothing else r

    def along(self, state: Tensor, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        pu = state * u
        mean = pu.sum(0)
        at = u.gather(0, t.unsqueeze(0)).squeeze(0)
        if self.smoothing:
            at = (1 - self.smoothing) * at + self.smoothing * u.mean(0)
        return mean - at, torch.addcmul(pu, state, mean.unsqueeze(0), value=-1)


@dataclass(frozen=True)
class _Probabilities(Link):
    """Targets are probabilities of the classes, (c, n); the state is log p."""

    def value(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(z, 0)
        return -(t * logp).sum(0), logp

    def residual(self, state: Tensor, t: Tensor) -> Tensor:
        return state.exp() * t.sum(0) - t

    def along(self, state: Tensor, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        total, p = t.sum(0), state.exp()
        pu = p * u
        mean = pu.sum(0)
        return total * mean - (t * u).sum(0), total * (pu - p * mean)

    def target(self, state: Tensor, t: Tensor) -> Tensor:
        return -state

    def mixed(self, state: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return state.exp() * v.sum(0) - v

    def mixed_transpose(self, state: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return (state.exp() * u).sum(0) - u


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    example_weights: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    kernel: str = "auto",
) -> Tensor:
    """Softmax cross-entropy of ``F.linear(x, weight, bias)`` as one operation.

    The value of ``F.cross_entropy(F.linear(x, weight, bias), target, ...)``, each example's
    loss multiplied by ω_i: ``mean`` is Σ ω_i ℓ_i / (number of examples that are not ignored). Two
    derivatives in every floating-point argument by explicit formulas; a Hessian product costs two
    matrix products and its cross-derivative with ω nothing more.

    Args:
        x: features, (n, d) or (d,); float64, float32, or 16-bit storage with float32 arithmetic.
        weight: (c, d).
        bias: (c,), or None.
        target: class indices (n,), or class probabilities (n, c).
        example_weights: ω, (n,).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: a class index of examples that do not count.
        label_smoothing: ε in [0, 1].
        kernel: what computes products with H: ``"torch"``, on CUDA also ``"rows"``,
            ``"two_pass"`` or ``"one_pass"`` (see `fused`); ``"auto"`` chooses.

    Returns:
        The loss, 0-d, or (n,) without reduction; float32 for 16-bit arguments.

    Raises:
        InvalidLoss: shapes, dtypes or options do not fit.
        KernelUnavailable: the kernel asked for cannot run here.
        NoThirdDerivative: it is differentiated three times. (Small ones, `formulas.SMALL`, are
            made of plain operations, which have all derivatives.)

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from torch_bilevel.ops import linear_cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> x, W, b = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)
        >>> t = torch.tensor([0, 1, 1, 0])
        >>> bool(torch.isclose(linear_cross_entropy(x, W, b, t),
        ...                    F.cross_entropy(F.linear(x, W, b), t)))
        True
    """
    name = "linear_cross_entropy"
    check_tensors(name, x, weight, bias, target, example_weights)
    single = x.dim() == 1
    if single:
        x, target = x.unsqueeze(0), target.unsqueeze(0)
    check(name, x, weight, bias, example_weights, reduction)
    if not 0 <= label_smoothing <= 1:
        raise InvalidLoss(
            f"{name}(label_smoothing={label_smoothing}) is not in [0, 1]."
        )
    soft = target.is_floating_point()
    if soft:
        target = real_target(name, target, x, weight)
    else:
        if target.shape != x.shape[:1] or target.dtype != torch.int64:
            raise InvalidLoss(
                f"{name}: target has shape {tuple(target.shape)} and dtype {target.dtype}; write "
                f"class indices, int64 of shape ({len(x)},), or class probabilities of shape "
                f"{(len(x), len(weight))}."
            )
    valid: Tensor | None = None
    kind = None if soft else SOFTMAX
    kernel = resolve(name, kernel, kind, x, weight)
    if as_written(x, weight, kernel, elementwise=False):
        weighted = example_weights is not None and reduction == "mean" and not soft
        count = (target != ignore_index).sum() if weighted else None
        function = partial(
            F.cross_entropy,
            target=target,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        result = plain_loss(
            function, x, weight, bias, example_weights, count, reduction
        )
    else:
        link: Link = _Indices(kernel, label_smoothing)
        if soft:
            link, target = _Probabilities(), target.mT
            if label_smoothing:
                target = target * (1 - label_smoothing) + label_smoothing / len(weight)
        else:
            valid = target != ignore_index
            target = target.masked_fill(~valid, 0)
        result = loss_of(
            link, x, weight, bias, target, example_weights, valid, reduction
        )
    return result.squeeze(0) if single and reduction == "none" else result
