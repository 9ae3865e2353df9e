"""ANIL (Raghu, Raghu, Bengio & Vinyals 2020): almost no inner loop, only the head adapts."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import RAGHU_2020
from .named import MetaAlgorithm


class ANIL(MetaAlgorithm):
    r"""Almost no inner loop: the head adapts, features and the head's initialisation are learned.

    ::

        for every task i:                        with optimizer.task():
            w ← x_head;  w ← w − α ∇_w ℓ_S(w, φ), N times
            ĝ += d ℓ_T(w_N, φ)/d(x_head, φ)          (query_loss(...).backward())
        (x_head, φ) ← (x_head, φ) − β ĝ / #tasks optimizer.outer_step()

    Features are constants in the inner loop: an inner step back-propagates through the head only.

    It only chooses parts: ``estimator="unrolled"``. What differs
    from the paper: any optimizer with an update rule may adapt.

    Args:
        inner: adapts the head inside a task.
        outer: moves features and the initialisation of the head; its parameters contain those of
            ``inner``.
        estimator: as in `BilevelOptimizer`.
        **options: further options of `BilevelOptimizer`.

    Raises:
        BilevelError: an inner parameter is not in ``outer``, or nothing else is.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> body, head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)
        >>> every = [*body.parameters(), *head.parameters()]
        >>> tb.ANIL(torch.optim.SGD(head.parameters(), lr=0.1), torch.optim.Adam(every))
        ANIL(inner=SGD, outer=Adam, estimator='unrolled', inner_steps=None)
    """

    bibtex: ClassVar[str] = RAGHU_2020
    parts: ClassVar[dict[str, Any]] = {"estimator": "unrolled"}
    features: ClassVar[bool] = True
