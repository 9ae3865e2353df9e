"""Independent samples of the inner objective, which can be taken again at another point.

    sample   the weighted calls of one inner step
    ticket   the samples (and random numbers) of one evaluation, in order

A recursive direction such as STORM's evaluates the same estimator at two points *on the same
samples*, all batches of a Neumann series and its random length included. So what an evaluation
draws is remembered in a ticket, and rewinding it gives the same things again, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from .calls import WeightedCall

Sample = list[WeightedCall]
T = TypeVar("T")


class Ticket:
    """What one evaluation draws.

    Args:
        fresh: gives independent samples; None asks for as many as the window has steps.
        generator: of whole numbers.
    """

    def __init__(
        self,
        fresh: Callable[[int | None], list[Sample]],
        generator: torch.Generator,
    ):
        self._fresh = fresh
        self._generator = generator
        self._drawn: list[Any] = []
        self._next = 0

    def samples(self, count: int | None) -> list[Sample]:
        """Independent samples of the inner objective."""
        return self._again(lambda: self._fresh(count))

    def integer(self, below: int) -> int:
        """A whole number, uniformly from 0 to ``below`` − 1."""
        return self._again(
            lambda: int(torch.randint(below, (), generator=self._generator))
        )

    def rewind(self) -> None:
        """What is drawn next is what was drawn first."""
        self._next = 0

    def _again(self, draw: Callable[[], T]) -> T:
        if self._next == len(self._drawn):
            self._drawn.append(draw())
        value = self._drawn[self._next]
        self._next += 1
        return value


def mean_calls(samples: Sequence[Sample]) -> list[WeightedCall]:
    """All calls of some samples, weighted so that the samples are averaged."""
    if len(samples) == 1:
        return samples[0]
    return [
        (call, weight / len(samples)) for calls in samples for call, weight in calls
    ]
