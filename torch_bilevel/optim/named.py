"""Named algorithms: subclasses of `BilevelOptimizer` that choose its parts."""

from __future__ import annotations

from typing import Any, ClassVar

from .bilevel import BilevelOptimizer
from .tasks import require_initialisations


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


class MetaAlgorithm(NamedAlgorithm):
    """A named algorithm that learns the initialisations of what adapts in a task.

    Attributes:
        features: whether there are outer variables besides those that adapt.

    Raises:
        BilevelError: an inner parameter is not in ``outer``, or all outer ones adapt.
    """

    features: ClassVar[bool] = False

    def __init__(self, inner: Any, outer: Any, **options: Any):
        super().__init__(inner, outer, **options)
        require_initialisations(self, self.features)
