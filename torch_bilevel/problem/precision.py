"""The precision gradients are computed in, which a loss may lower by an autocast of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InvalidLoss
from .calls import Call, WeightedCall
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


def look_at(problem: BilevelProblem, call: Call, loss: Tensor) -> None:
    """Remember what a function computes in, and refuse what is no derivative.

    Where complex numbers are made of real parameters, vectors are split so that they can be too.

    Raises:
        InvalidLoss: an embedding scales its gradient.
    """
    dtypes, pairs = set(), False
    for node in nodes_of([loss]):
        outputs = [output.dtype for output in node._input_metadata if output]
        pairs |= any(dtype.is_complex for dtype in outputs)
        dtypes |= {dtype.to_real() for dtype in outputs}
        if getattr(node, "_saved_scale_grad_by_freq", False):
            raise InvalidLoss(
                f"{call.name!r} uses an embedding with scale_grad_by_freq=True, whose gradient is "
                "not that of the loss: a second derivative of it would mean nothing. Leave the "
                "option out, or weight the rows in the loss."
            )
    problem.inner.layout.paired |= pairs
    problem.outer.layout.paired |= pairs
    problem.dtypes.add(call.function, dtypes)
