"""SRBA (Dagréou et al. 2024): SOBA with recursive differences and full passes."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import DAGREOU_2024
from .named import NamedAlgorithm


class SRBA(NamedAlgorithm):
    r"""SRBA: SARAH on the three directions of SOBA; linear with constant steps.

    ::

        D ← D(new; ξ) − D(old; ξ) + D,   and every ``period`` steps D ← D(new; all data)

    It only chooses parts: ``estimator="srba"`` and ``inner_steps=1``. Give the data to pass over
    (``inner_loss(data=...)``, ``outer_loss(data=...)``); an inner loss with arguments and without
    data is refused. What differs from the paper: ``period`` is 8 steps, while the theory's is of
    the order of the number of batches, ``"srba(memory='sarah(period=64)')"``.

    Args:
        inner: as in `BilevelOptimizer`.
        outer: as in `BilevelOptimizer`.
        **options: options of `BilevelOptimizer`, in place of these.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> tb.SRBA(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        SRBA(inner=SGD, outer=SGD, estimator="joint(memory='sarah(period=8)')", inner_steps=1)
    """

    bibtex: ClassVar[str] = DAGREOU_2024
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "srba",
        "inner_steps": 1,
    }
