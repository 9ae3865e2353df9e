"""DARTS (Liu, Simonyan & Yang 2019): an outer step after every inner one."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import LIU_2019
from .named import NamedAlgorithm


class DARTS(NamedAlgorithm):
    r"""DARTS, second order: the gradient through one step, its product by a finite difference.

    ::

        for k = 0, 1, …:
            y ← y − η ∂_y g                                       (your loop, your optimizer)
            x ← x − β (∂_x f − η [∂_x g(x, y⁺) − ∂_x g(x, y⁻)]/(2 ε)),   y^± = y ± ε ∂_y f
                                                                  (your outer optimizer)

    It only chooses parts: ``estimator="darts"`` and ``inner_steps=1``; ε = R/‖∂_y f‖ with the
    paper's R = 0.01. What differs from the paper: the step is the one your optimizer has just
    taken, instead of a virtual one that is taken back. Cheap and biased.

    Args:
        inner: as in `BilevelOptimizer`.
        outer: as in `BilevelOptimizer`.
        **options: options of `BilevelOptimizer`, in place of these.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> tb.DARTS(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        DARTS(inner=SGD, outer=SGD, estimator='darts', inner_steps=1)
    """

    bibtex: ClassVar[str] = LIU_2019
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "darts",
        "inner_steps": 1,
    }
