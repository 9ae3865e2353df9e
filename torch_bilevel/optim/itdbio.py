"""ITD-BiO (Ji, Yang & Liang 2021): iterative differentiation with warm starts."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import JI_2021
from .named import NamedAlgorithm


class ITDBiO(NamedAlgorithm):
    r"""ITD-BiO: T inner steps, differentiated as they were taken, one outer step.

        for k = 0, 1, …:
            y_0 ← the last y;  y_{t+1} = y_t − α ∇_y g(x, y_t), t < T      (your loop)
            x ← x − β d f(x, y_T(x))/dx,  y_0 held constant                (your outer optimizer)

    It only chooses parts: ``estimator="unrolled"`` and ``inner_steps=T``. The default T = 10 is
    that of the authors' 20 Newsgroups script. What differs from the paper: any optimizer with
    an update rule may take the inner steps, and they are replayed one at a time instead of
    kept in one graph.

    Args:
        inner: as in `BilevelOptimizer`.
        outer: as in `BilevelOptimizer`.
        estimator: ``"unrolled(...)"``.
        inner_steps: T.
        **options: further options of `BilevelOptimizer`.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> tb.ITDBiO(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        ITDBiO(inner=SGD, outer=SGD, estimator='unrolled', inner_steps=10)
    """

    bibtex: ClassVar[str] = JI_2021
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "unrolled",
        "inner_steps": 10,
    }
