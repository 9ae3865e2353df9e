"""SABA (Dagréou et al. 2022): SOBA with SAGA tables."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import DAGREOU_2022
from .named import NamedAlgorithm


class SABA(NamedAlgorithm):
    r"""SABA: SOBA with a SAGA table for each of the five sums; linear with constant steps.

    ::

        each of ∇_y g_i, H_i v, J_i v, ∂_y f_j, ∂_x f_j ← new − table[i] + mean(table)

    It only chooses parts: ``estimator="saba"`` and ``inner_steps=1``. Needs numbered batches for
    both losses: ``batches = tb.Batches((x, y), 64)``, ``inner_loss(data=batches)``, and the loop
    iterates over ``batches``. Memory: 2 p + d numbers for an inner batch, p + d for an outer one.
    Tables start at zero, as the authors'. What differs from the paper: v has the opposite sign.


    Args:
        inner: as in `BilevelOptimizer`.
        outer: as in `BilevelOptimizer`.
        **options: options of `BilevelOptimizer`, in place of these.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> tb.SABA(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        SABA(inner=SGD, outer=SGD, estimator="joint(memory='saga')", inner_steps=1)
    """

    bibtex: ClassVar[str] = DAGREOU_2022
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "saba",
        "inner_steps": 1,
    }
