"""Meta-SGD (Li, Zhou, Chen & Li 2017): an initialisation and a learning rate for every entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from .citation import LI_2017
from .named import MetaAlgorithm


class MetaSGD(MetaAlgorithm):
    r"""MAML that also learns how fast, and in which direction, every entry of w adapts.

    ::

        for every task i:                        with optimizer.task():
            w ← x;  w ← w − α ρ ∘ ∇ℓ_S(w), N times    (your loop; .grad is multiplied by ρ)
            ĝ += d ℓ_T(w_N) / d(x, ρ)                (query_loss(...).backward())
        (x, ρ) ← (x, ρ) − β ĝ / #tasks           optimizer.outer_step()

    ρ are outer variables, one tensor for each inner parameter and of its shape; ``rates`` holds
    them. They start at 1 and are learned as factors of the rate α of ``inner``, so the rate of an
    entry is α ρ, which may become negative. Memory is that of MAML and one more vector.

    It only chooses parts: ``estimator="unrolled"`` and `learn_rates`. What differs from the paper:
    several steps and any inner optimizer may adapt (ρ multiplies the gradient before the optimizer
    sees it), and ρ starts at 1 instead of at random.

    Args:
        inner: adapts the parameters inside a task.
        outer: moves their initialisation; its parameters contain those of ``inner``. The rates
            are added to it as one more group.
        rates: see `BilevelOptimizer.learn_rates`.
        estimator: as in `BilevelOptimizer`.
        **options: further options of `BilevelOptimizer`.

    Raises:
        BilevelError: an inner parameter is not in ``outer``, or ``rates`` do not fit.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> w = torch.tensor([4.0], requires_grad=True)
        >>> optimizer = tb.MetaSGD(torch.optim.SGD([w], lr=0.25), torch.optim.SGD([w], lr=0.5))
        >>> support = optimizer.inner_loss(lambda: (w**2).sum())
        >>> query = optimizer.outer_loss(lambda: (w**2).sum())
        >>> with optimizer.task():
        ...     support().backward(); _ = optimizer.step()    # w = (1 − 2αρ) x = 2
        ...     query().backward()
        >>> w.grad, optimizer.rates[0].grad                 # 2w (1 − 2αρ),  −2w · 2αx
        (tensor([2.]), tensor([-8.]))
    """

    bibtex: ClassVar[str] = LI_2017
    parts: ClassVar[dict[str, Any]] = {"estimator": "unrolled"}

    def __init__(
        self,
        inner: Any,
        outer: Any,
        *,
        rates: Sequence[Tensor] | None = None,
        **options: Any,
    ):
        super().__init__(inner, outer, **options)
        self.rates = self.learn_rates(rates)
