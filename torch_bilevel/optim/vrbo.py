"""VRBO (Yang, Ji & Liang 2021): recursive differences for both directions."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import YANG_2021
from .named import NamedAlgorithm


class VRBO(NamedAlgorithm):
    r"""VRBO: directions of a full pass now and then, SARAH differences at every inner step between.

    ::

        for k = 0, 1, …:
            every q-th time:  u, w ← ∇_y g, ĝ on all samples
            for t < m:  u ← u + ∇_y g(now; ζ) − ∇_y g(last point; ζ),    y ← y − λ u
                        w ← w + ĝ(now; ζ) − ĝ(last point; ζ)
            x ← x − γ w

    It only chooses parts: ``estimator="vrbo"`` and ``inner_steps=m``, with m = 10 and a full pass
    every 30 inner steps, which is q = 3 for this m (for another one write
    ``"vrbo(memory='sarah(period=...)')"`` with q m). A full pass is over the data the losses were
    registered with, which both need to be given as something to iterate over. ĝ is that of
    `StocBiO`, with all its samples the same at both points. What differs from the paper: x steps
    after the m inner steps that follow a full pass instead of before them, and one outer batch
    serves all m differences of a window. What differs from the authors' code: both points of a
    difference are the true ones, the move of x included, and the Neumann sum is the paper's.

    Args:
        inner: as in `BilevelOptimizer`.
        outer: as in `BilevelOptimizer`.
        **options: options of `BilevelOptimizer`, in place of these.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> o = tb.VRBO(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        >>> print(o.estimator)
        stochastic_neumann(num_steps=4, memory='sarah(period=30)')
    """

    bibtex: ClassVar[str] = YANG_2021
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "vrbo",
        "inner_steps": 10,
    }
