"""The precision gradients are computed in, which a loss may lower by an autocast of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .calls import WeightedCall
from .once import nodes_of

if TYPE_CHECKING:
    from .problem import BilevelProblem


def precisions(
    problem: BilevelProblem, calls: Sequence[WeightedCall]
) -> set[torch.dtype]:
    """What gradients are computed in: parameters, autocast around the losses and inside them.

    A function that was not evaluated yet is, once. What a compiled function does inside is unknown.
    """
    found = {tensor.dtype for tensor in problem.inner.tensors}
    for call, _ in calls:
        found |= {dtype for _, on, dtype in call.autocast if on and dtype}
        if call.is_map:
            continue
        if call.function not in problem.dtypes:
            with problem.evaluating(call, once=True):
                problem.run(call)
        found |= problem.dtypes.get(call.function, set())
    return found


def dtypes_of(loss: Tensor) -> set[torch.dtype]:
    """The dtypes of everything between the leaves and a loss."""
    return {
        output.dtype
        for node in nodes_of([loss])
        for output in node._input_metadata
        if output is not None
    }
