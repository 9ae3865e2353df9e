"""SOBA (Dagréou et al. 2022): y, v and x move together."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import DAGREOU_2022
from .named import NamedAlgorithm


class SOBA(NamedAlgorithm):
    r"""SOBA: one sample, three directions, three simultaneous steps.

    ::

        D_y = ∇_y g_i,    D_v = H_i v − ∂_y f_j,    D_x = ∂_x f_j − J_i v     all at (x, y, v)
        y ← y − ρ D_y  (your optimizer),   v ← v − ρ D_v,   x ← x − γ D_x  (your outer optimizer)

    It only chooses parts: ``estimator="soba"`` and ``inner_steps=1``. ρ of v is the inner learning
    rate, so one schedule holds for both; the theory's decay as k^{−1/2}. What differs from the
    paper: v has the opposite sign, y and x may be moved by any optimizer.


    Args:
        inner: as in `BilevelOptimizer`.
        outer: as in `BilevelOptimizer`.
        **options: options of `BilevelOptimizer`, in place of these.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> tb.SOBA(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        SOBA(inner=SGD, outer=SGD, estimator='joint', inner_steps=1)
    """

    bibtex: ClassVar[str] = DAGREOU_2022
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "soba",
        "inner_steps": 1,
    }
