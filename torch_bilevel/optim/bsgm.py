"""BSGM (Grazzi, Pontil & Salzo 2023): stochastic gradients without warm starts."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import GRAZZI_2023
from .named import NamedAlgorithm


class BSGM(NamedAlgorithm):
    r"""BSGM: every outer step begins the inner problem and the linear system anew.

    ::

        for k = 0, 1, …:
            y ← T inner steps on samples, from y_0                (your loop, your optimizer)
            v_0 = 0,   v_{j+1} = v_j + η (∂_y f − H_j v_j),   j < K
            x ← x − β (∂_x f − (1/J) Σ_j J_j v_K)                 (your outer optimizer)

    It only chooses parts: ``estimator="bsgm"``, ``inner_steps=T`` and ``warm_start=False``, with
    T = K = J = 20 (the authors set them equal). y_0 is where the inner parameters stand at the
    first call of the inner loss; they go back there at the first call after an outer step, so that
    what was reached can be looked at in between. What differs from the paper: the inner map is
    your optimizer's gradient step (for other maps see `FixedPointIteration`), η is 1/λ̂_max, x is
    projected only with ``constraints=``. From a cold start 20 steps may be far too few.

    Args:
        inner: as in `BilevelOptimizer`.
        outer: as in `BilevelOptimizer`.
        **options: options of `BilevelOptimizer`, in place of these.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> tb.BSGM(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        BSGM(inner=SGD, outer=SGD, estimator='stochastic_richardson', inner_steps=20)
    """

    bibtex: ClassVar[str] = GRAZZI_2023
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "bsgm",
        "inner_steps": 20,
        "warm_start": False,
    }
