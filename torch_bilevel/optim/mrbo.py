"""MRBO (Yang, Ji & Liang 2021): recursive momentum for both directions."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import YANG_2021
from .named import NamedAlgorithm


class MRBO(NamedAlgorithm):
    r"""MRBO: y and x step together, each along a STORM direction.

    ::

        for k = 0, 1, …, all at (x_k, y_k), both terms of a difference on the same samples:
            u ← ∇_y g + (1 − a_k)(u − ∇_y g at the last point)     (in ``.grad``, before your step)
            w ← ĝ + (1 − a_k)(w − ĝ at the last point)             (ĝ as in stocBiO)
            y ← y − λ η_k u,    x ← x − γ η_k w                    (your optimizers)

    It only chooses parts: ``estimator="mrbo"`` and ``inner_steps=1``. The step sizes η_k ∝
    k^{−1/3} are learning-rate schedules of your optimizers. a_k = 0.9 (10/(10 + k))^{2/3}. With
    more inner steps, w moves once for every outer step, where the last inner step started. What
    differs from the authors' code: the first directions are plain estimates instead of zero,
    nothing steps twice, and the Neumann sum is the paper's.


    Args:
        inner: as in `BilevelOptimizer`.
        outer: as in `BilevelOptimizer`.
        **options: options of `BilevelOptimizer`, in place of these.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> tb.MRBO(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        MRBO(inner=SGD, outer=SGD, estimator="stochastic_neumann(memory='storm')", inner_steps=1)
    """

    bibtex: ClassVar[str] = YANG_2021
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "mrbo",
        "inner_steps": 1,
    }
