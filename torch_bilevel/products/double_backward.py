"""Double backward: the graph of ∇_y g is kept, and differentiated once for every product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..problem import BilevelProblem, Linearization, WeightedCall
from .base import Products


@dataclass(frozen=True)
class DoubleBackward(Products):
    """Differentiate a kept graph of the inner gradient; the default.

    Needs: operations with a second derivative. Costs: about one gradient to build (and its memory,
    two to three times a gradient's), then one gradient a product, H v and J v together: 1.0 for
    one linear layer, 2 for deep networks.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.DoubleBackward())
        'double_backward'
    """

    name: ClassVar[str] = "double_backward"
    words: ClassVar[str] = "double backward on one graph per point"

    def linearize(
        self, problem: BilevelProblem, calls: Sequence[WeightedCall]
    ) -> Linearization:
        """See `Products.linearize`."""
        return problem.linearize(calls)
