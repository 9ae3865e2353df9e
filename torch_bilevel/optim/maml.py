"""MAML (Finn, Abbeel & Levine 2017): learn an initialisation through the steps of adaptation."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import FINN_2017
from .named import MetaAlgorithm


class MAML(MetaAlgorithm):
    r"""Model-agnostic meta-learning, N steps.

    ::

        for every task i:                        with optimizer.task():
            w ← x;  w ← w − α ∇ℓ_S(w), N times       (your loop, your optimizer)
            ĝ += Π_j (I − α∇²ℓ_S(w_j)) ∇ℓ_T(w_N)     (query_loss(...).backward())
        x ← x − β ĝ / #tasks                     optimizer.outer_step()

    Memory is N iterates and one step's graph.

    It only chooses parts: ``estimator="unrolled"``. What differs
    from the paper: any optimizer with an update rule may adapt.

    Args:
        inner: adapts the parameters inside a task.
        outer: moves their initialisation; its parameters contain those of ``inner``.
        estimator: as in `BilevelOptimizer`.
        **options: further options of `BilevelOptimizer`.

    Raises:
        BilevelError: an inner parameter is not in ``outer``.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> net = torch.nn.Linear(4, 3)
        >>> tb.MAML(torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.Adam(net.parameters()))
        MAML(inner=SGD, outer=Adam, estimator='unrolled', inner_steps=None)
    """

    bibtex: ClassVar[str] = FINN_2017
    parts: ClassVar[dict[str, Any]] = {"estimator": "unrolled"}
