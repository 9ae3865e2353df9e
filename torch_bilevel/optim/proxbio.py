"""Proximal BiO, BiO-AIMA (Chen, Kailkhura & Zhou 2023): a regulariser h of the outer variables."""

from __future__ import annotations

from typing import Any, ClassVar

from .. import _checks
from .citation import CHEN_2023
from .named import NamedAlgorithm


class ProxBiO(NamedAlgorithm):
    r"""BiO-AIMA: AID-BiO with Nesterov's momentum in the linear solve and a proximal outer step.

    ::

        min_x f(x, y*(x)) + h(x),    h nonsmooth, possibly nonconvex

        for k = 0, 1, …:
            y ← T inner steps from the last y              (your loop, your optimizer)
            v ← N steps of Nesterov's momentum on H v = ∂_y f, from the last v
            x ← prox_{βh}(x − β (∂_x f − J v))             (outer=SGD(lr=β), constraints=h)

    It only chooses parts: ``estimator="proxbio"``, which is ``"nesterov(max_steps=N)"``, and
    ``inner_steps=T``. T = N = 10 are those of `AIDBiO` (the authors' script has T = 5). What
    differs from the paper: y may be moved by any optimizer and minibatches; J v is averaged over
    the window; the solve stops early
    when its relative residual falls below 1e-4. The script solves for v by CG instead of momentum,
    has the momentum in y, and a prox of half of h. Its own h,
    ``−w Σ min(|x_i|, a)``, is a `Constraint` to write.

    Args:
        inner: as in `BilevelOptimizer`.
        outer: plain SGD; its learning rate is β.
        **options: options of `BilevelOptimizer`, in place of these; ``constraints=`` is h.

    Raises:
        BilevelError: ``outer`` is not plain SGD.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> inner, outer = torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1)
        >>> tb.ProxBiO(inner, outer, constraints="l1(weight=0.1)")
        ProxBiO(inner=SGD, outer=SGD, estimator='nesterov(max_steps=10)', inner_steps=10)
    """

    bibtex: ClassVar[str] = CHEN_2023

    parts: ClassVar[dict[str, Any]] = {
        "estimator": "proxbio",
        "inner_steps": 10,
    }

    def __init__(self, inner: Any, outer: Any, **options: Any):
        _checks.plain_sgd("ProxBiO", outer)
        super().__init__(inner, outer, **options)
