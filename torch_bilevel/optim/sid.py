"""SID (Grazzi, Pontil & Salzo 2021): stochastic implicit differentiation."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import GRAZZI_2021
from .named import NamedAlgorithm


class SID(NamedAlgorithm):
    r"""SID: T inner steps, K stochastic fixed-point steps for v, J averaged over J samples.

    ::

        y ← T inner steps on samples                                  (your loop, your optimizer)
        v_0 = 0,   v_{k+1} = v_k + η_k (∂_y f − H_k v_k),   η_k = η γ/(γ + k),   k < K
        ∇̂Φ = ∂_x f − (1/J) Σ_j J_j v_K

    It only chooses parts: ``estimator="sid"`` and ``inner_steps=T``, with T = K = J = 20 (the
    authors set them equal). The mean squared error is O(1/K) + O(1/J) with decreasing steps, which
    ask γ of about the condition number (default 20); ``"bsgm"`` is the same with constant steps,
    linear down to a ball of noise. What differs from the paper: the inner map is your optimizer's
    gradient step (for other maps see `FixedPointIteration`), η is 1/λ̂_max.


    Args:
        inner: as in `BilevelOptimizer`.
        outer: as in `BilevelOptimizer`.
        **options: options of `BilevelOptimizer`, in place of these.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> tb.SID(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        SID(inner=SGD, outer=SGD, estimator='stochastic_richardson(decay=20.0)', inner_steps=20)
    """

    bibtex: ClassVar[str] = GRAZZI_2021
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "sid",
        "inner_steps": 20,
    }
