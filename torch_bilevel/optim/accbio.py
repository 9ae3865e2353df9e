"""AccBiO (Ji & Liang 2021): Nesterov's momentum inside, heavy ball for v, extrapolation outside."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import JI_LIANG_2021
from .named import NamedAlgorithm


class AccBiO(NamedAlgorithm):
    r"""AccBiO: hypergradients at extrapolated points, for Φ (strongly) convex.

    ::

        for k = 0, 1, …:
            y ← N Nesterov steps at the query point x̃, from y_0  (your loop, your optimizer)
            v ← M heavy-ball steps on H v = ∂_y f, from 0
            z ← x̃ − α G,  x ← τ x̃ + (1 − τ) x − β G,  x̃ ← η x + (1 − η) z

    It only chooses parts: ``estimator="accbio"``, ``inner_steps=N`` with N = M = 20, and
    ``warm_start=False``: every outer step begins anew where the first did. The bounded-gradient
    variant, AccBiO-BG, goes on from the last y and v: ``warm_start=True, inner_steps=10,
    estimator="accbio_bg"``. Without warm starts N and M must grow as √κ log(1/ε). The outer
    optimizer is plain SGD with lr = α ≤ 1/(2 L_Φ); inner: ``SGD(lr=1/L, momentum=(√κ − 1)/(√κ + 1),
    nesterov=True)``. What differs from the paper: without the constant of strong convexity of Φ
    (``estimator="accbio(strong_convexity=...)"``) the sequence restarts adaptively.

    Args:
        inner: as in `BilevelOptimizer`.
        outer: plain SGD.
        **options: options of `BilevelOptimizer`, in place of these.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> o = tb.AccBiO(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        >>> print(o.estimator)
        accelerated
    """

    bibtex: ClassVar[str] = JI_LIANG_2021
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "accbio",
        "inner_steps": 20,
        "warm_start": False,
    }
