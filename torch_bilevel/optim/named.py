"""Named algorithms: subclasses of `BilevelOptimizer` that choose its parts."""

from __future__ import annotations

from typing import Any, ClassVar

from .bilevel import BilevelOptimizer


class NamedAlgorithm(BilevelOptimizer):
    """A `BilevelOptimizer` with a paper's choices as defaults; whatever is given wins.

    Attributes:
        bibtex: the paper.
        parts: options of `BilevelOptimizer`.
    """

    bibtex: ClassVar[str]
    parts: ClassVar[dict[str, Any]]

    def __init__(self, inner: Any, outer: Any, **options: Any):
        super().__init__(inner, outer, **{**self.parts, **options})
