"""Independent samples of the inner objective, which can be taken again at another point.

    sample   the weighted calls of one inner step
    ticket   the samples (and random numbers) of one evaluation, by what they are for

A recursive direction such as STORM's evaluates the same estimator at two points *on the same
samples*, all batches of a Neumann series and its random length included. So what an evaluation
draws is remembered in a ticket, which gives the same thing for the same purpose, also where the
second evaluation asks in another order, or for more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
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
        self._drawn: dict[Hashable, Any] = {}

    def samples(self, purpose: Hashable, count: int | None) -> list[Sample]:
        """Independent samples of the inner objective, the same ones for the same purpose."""
        return self._once(purpose, lambda: self._fresh(count))

    def integer(self, below: int) -> int:
        """A whole number, uniformly from 0 to ``below`` − 1, the same one every time."""
        draw = partial(torch.randint, below, (), generator=self._generator)
        return self._once("integer", lambda: int(draw()))

    def _once(self, purpose: Hashable, draw: Callable[[], T]) -> T:
        if purpose not in self._drawn:
            self._drawn[purpose] = draw()
        return self._drawn[purpose]


def mean_calls(samples: Sequence[Sample]) -> list[WeightedCall]:
    """All calls of some samples, weighted so that the samples are averaged."""
    if len(samples) == 1:
        return samples[0]
    return [
        (call, weight / len(samples)) for calls in samples for call, weight in calls
    ]
