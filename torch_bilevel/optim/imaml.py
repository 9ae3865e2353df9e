"""iMAML (Rajeswaran, Finn, Kakade & Levine 2019): an initialisation by implicit gradients."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import RAJESWARAN_2019
from .named import MetaAlgorithm


class IMAML(MetaAlgorithm):
    r"""Implicit MAML: adapt to the minimum of a proximal problem, then solve one linear system.

    ::

        for every task i:                        with optimizer.task():
            w ≈ argmin ℓ_S(w) + (λ/2)‖w − x‖²        (your loop; the pull is added to .grad)
            ĝ += (I + ∇²ℓ_S(w)/λ)⁻¹ ∇ℓ_T(w)          (query_loss(...).backward())
        x ← x − β ĝ / #tasks                     optimizer.outer_step()

    No trajectory is stored, however many steps adapt.

    It only chooses parts: ``estimator="cg(max_steps=5)"``. Defaults λ = 1 and
    5 steps of CG are those of the authors' code. What differs from it: the pull acts in every
    step instead of once at the end, and CG is not damped unless asked (``damping=1.0``).

    Args:
        inner: adapts the parameters inside a task.
        outer: moves their initialisation; its parameters contain those of ``inner``.
        estimator: as in `BilevelOptimizer`.
        proximal_term: λ.
        **options: further options of `BilevelOptimizer`.

    Raises:
        BilevelError: an inner parameter is not in ``outer``.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> net = torch.nn.Linear(4, 3)
        >>> tb.IMAML(torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.Adam(net.parameters()))
        IMAML(inner=SGD, outer=Adam, estimator='cg(max_steps=5)', inner_steps=None)
    """

    bibtex: ClassVar[str] = RAJESWARAN_2019
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "cg(max_steps=5)",
        "proximal_term": 1.0,
    }
