"""stocBiO (Ji, Yang & Liang 2021): a Neumann series on independent samples."""

from __future__ import annotations

from typing import Any, ClassVar

from .citation import JI_2021
from .named import NamedAlgorithm


class StocBiO(NamedAlgorithm):
    r"""stocBiO: T inner steps, Q products with H on new samples, one outer step.

    ::

        for k = 0, 1, …:
            y ← T inner steps on minibatches, from the last y   (your loop, your optimizer)
            v = η Σ_{q ≤ Q} Π (I − η H_q) ∂_y f                (a new sample for every H_q)
            x ← x − β (∂_x f − J v)                            (J on samples of its own)

    It only chooses parts: ``estimator="stocbio"`` and ``inner_steps=T``, with T = 10 and Q = 10,
    that is eleven terms, as in the authors' 20 Newsgroups script. Give fresh samples with
    ``inner_loss(data=...)``; without, recorded steps are drawn again. What differs from the paper:
    η is 1/λ̂_max instead of a constant, J is averaged over as many samples as there were inner
    steps, all samples of H have one batch (theory's growing ones: ``hessian_batches=B*Q,
    hessian_ratio=1 - eta * mu``). What differs from the authors' code: the sum is the paper's, η
    times every term, the first included.


    Args:
        inner: as in `BilevelOptimizer`.
        outer: as in `BilevelOptimizer`.
        **options: options of `BilevelOptimizer`, in place of these.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> tb.StocBiO(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        StocBiO(inner=SGD, outer=SGD, estimator='stochastic_neumann(num_steps=11)', inner_steps=10)
    """

    bibtex: ClassVar[str] = JI_2021
    parts: ClassVar[dict[str, Any]] = {
        "estimator": "stocbio",
        "inner_steps": 10,
    }
