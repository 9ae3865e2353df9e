"""First-order MAML (Finn, Abbeel & Levine 2017): the query gradient at the adapted parameters."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import FINN_2017
from .named import MetaAlgorithm


class FOMAML(MetaAlgorithm):
    r"""First-order MAML: ĝ = ∇ℓ_T(w_N), every second derivative dropped.

    ::

        for every task i:                        with optimizer.task():
            w ← x;  w ← w − α ∇ℓ_S(w), N times       (your loop, your optimizer)
            ĝ += ∇ℓ_T(w_N)                           (query_loss(...).backward())
        x ← x − β ĝ / #tasks                     optimizer.outer_step()


    It only chooses parts: ``estimator="first_order"``. What differs from
    the paper: nothing but that any optimizer may adapt, one without an update rule too.

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
        >>> tb.FOMAML(torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.Adam(net.parameters()))
        FOMAML(inner=SGD, outer=Adam, estimator='first_order', inner_steps=None)
    """

    bibtex: ClassVar[str] = FINN_2017
    parts: ClassVar[dict[str, Any]] = {"estimator": "first_order"}
