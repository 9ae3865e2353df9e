"""PZOBO (Sow, Ji & Liang 2022): the response of the inner loop to random moves of x."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import SOW_2022
from .named import NamedAlgorithm


class PZOBO(NamedAlgorithm):
    r"""PZOBO and PZOBO-S: T inner steps, Q times again with x moved at random, one outer step.

    ::

        for k = 0, 1, …:
            y ← T inner steps from the last y               (your loop, your optimizer)
            δ_j = (y_T(x + μ u_j) − y)/μ,  u_j ~ N(0, I),  j = 1 … Q     (the same start, the
                                                            same minibatches)
            x ← x − β (∂_x f + (1/Q) Σ_j ⟨δ_j, ∂_y f⟩ u_j)  (your outer optimizer)

    It only chooses parts: ``estimator="pzobo"`` and ``inner_steps=T``. T = 10 and μ = 0.01 are
    those of the authors' scripts (T from 10 to 30, μ 0.01 or 0.1), Q = 10 is that of the public
    benchmark of bilevel methods (theirs is 1). What differs: directions are Gaussian as in the
    paper, while the scripts' have unit norm without a factor d to make up for it, so outer learning
    rates tuned with those scripts are too large by d here; y may be moved by any optimizer.

    Args:
        inner: as in `BilevelOptimizer`.
        outer: as in `BilevelOptimizer`.
        estimator: ``"pzobo(...)"``, see `ResponseJacobian`.
        inner_steps: T.
        **options: further options of `BilevelOptimizer`.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> tb.PZOBO(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        PZOBO(inner=SGD, outer=SGD, estimator='pzobo', inner_steps=10)
    """

    bibtex: ClassVar[str] = SOW_2022
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "pzobo",
        "inner_steps": 10,
    }
