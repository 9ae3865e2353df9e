"""Reptile (Nichol, Achiam & Schulman 2018): an initialisation without an outer loss."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import NICHOL_2018
from .named import MetaAlgorithm


class Reptile(MetaAlgorithm):
    r"""Move the initialisation towards where training on each task ended.

    ::

        for every task i:                        with optimizer.task():
            w ← x;  w ← w − α ∇ℓ(w), N times         (your loop, your optimizer)
            ĝ += x − w                               (at the end of the task, by itself)
        x ← x − ε ĝ / #tasks                     optimizer.outer_step()

    No outer loss is registered or back-propagated, and no derivative of the loop is taken.

    It only chooses parts: ``estimator="displacement"``. What differs from
    the paper: any optimizer may adapt, its state is fresh in every task (the authors keep Adam's),
    and ε belongs to ``outer``: plain SGD with ``lr=ε`` is the paper's update.

    Args:
        inner: adapts the parameters inside a task.
        outer: moves their initialisation; its parameters contain those of ``inner``.
        estimator: as in `BilevelOptimizer`.
        **options: further options of `BilevelOptimizer`.

    Raises:
        BilevelError: an inner parameter is not in ``outer``.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> w = torch.tensor([4.0], requires_grad=True)
        >>> optimizer = tb.Reptile(torch.optim.SGD([w], lr=0.25), torch.optim.SGD([w], lr=0.5))
        >>> loss = optimizer.inner_loss(lambda: (w**2).sum())
        >>> with optimizer.task():
        ...     loss().backward(); _ = optimizer.step()       # 4 → 2
        >>> _ = optimizer.outer_step()                      # 4 − 0.5 (4 − 2)
        >>> w.detach()
        tensor([3.])
    """

    bibtex: ClassVar[str] = NICHOL_2018
    parts: ClassVar[dict[str, Any]] = {"estimator": "displacement"}
