"""AID-BiO (Ji, Yang & Liang 2021): approximate implicit differentiation with warm starts."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import JI_2021
from .named import NamedAlgorithm


class AIDBiO(NamedAlgorithm):
    r"""AID-BiO: T inner steps, N steps on H v = ∂_y f, one outer step.

        for k = 0, 1, …:
            y ← T inner steps from the last y              (your loop, your optimizer)
            v ← N steps of CG (or fixed point) on H v = ∂_y f, from the last v
            x ← x − β (∂_x f − J v)                        (your outer optimizer)

    It only chooses parts: ``estimator="cg(max_steps=N)"`` and ``inner_steps=T``. Defaults T = N =
    10 are those of the authors' 20 Newsgroups script. What differs from the paper: y may be
    moved by any optimizer and minibatches; J v is averaged over the window; the solve stops
    early when its relative residual falls below 1e-4.

    Args:
        inner: as in `BilevelOptimizer`.
        outer: as in `BilevelOptimizer`.
        estimator: ``"cg(...)"`` (AID-CG) or ``"richardson(...)"`` (AID-FP).
        inner_steps: T.
        **options: further options of `BilevelOptimizer`.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> tb.AIDBiO(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        AIDBiO(inner=SGD, outer=SGD, estimator='cg(max_steps=10)', inner_steps=10)
    """

    bibtex: ClassVar[str] = JI_2021
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "cg(max_steps=10)",
        "inner_steps": 10,
    }
