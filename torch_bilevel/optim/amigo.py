"""AmIGO (Arbel & Mairal 2022): warm starts for y and v, stochastic steps for both."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import ARBEL_2022
from .named import NamedAlgorithm


class AmIGO(NamedAlgorithm):
    r"""AmIGO: T stochastic steps for y, N for v, both from where they were, then one for x.

    ::

        for k = 0, 1, …:
            y ← T inner steps on samples, from the last y         (your loop, your optimizer)
            v ← N steps v − η (H_j v − ∂_y f) on new samples, from the last v
            x ← x − β (∂_x f − J v)                               (your outer optimizer)

    It only chooses parts: ``estimator="amigo"`` and ``inner_steps=T``, with T = N = 10 as in the
    public benchmark of bilevel methods. What differs from the paper: η is 1/λ̂_max, J is averaged
    over as many samples as there were inner steps.

    Args:
        inner: as in `BilevelOptimizer`.
        outer: as in `BilevelOptimizer`.
        **options: options of `BilevelOptimizer`, in place of these.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> tb.AmIGO(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        AmIGO(inner=SGD, outer=SGD, estimator='sgd(warm_start=True)', inner_steps=10)
    """

    bibtex: ClassVar[str] = ARBEL_2022
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "amigo",
        "inner_steps": 10,
    }
