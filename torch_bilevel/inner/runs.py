"""Runs of small neighbouring parameters, whose update is differentiated as that of one vector.

A rule's two dozen operations cost the same few microseconds on a bias as on a thousand entries, and
most models have more biases and norms than matrices. Rules act entry by entry, so parameters with
the same rule, hyperparameters and kind of state may be laid end to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .adjoint import PIECE, differentiable
from .rule import Hyper, State, UpdateRule

Update = tuple[UpdateRule, Hyper]


def runs(
    updates: Sequence[Update],
    values: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    states: Sequence[State],
    bars: Sequence[State],
) -> Iterator[range]:
    """Split the parameters into runs that can be taken as one vector, in order.

    Args:
        updates: rule and hyperparameters of every parameter.
        values: the parameters before the step.
        gradients: what the step consumed; a parameter without stands alone.
        states: optimizer state before the step.
        bars: adjoints of the state after it.
    """
    start, size = 0, 0
    for index in range(len(values)):
        numel = values[index].numel()
        fits = (
            index > start
            and size + numel <= PIECE
            and _alike(index - 1, index, updates, values, gradients, states, bars)
        )
        if not fits and index > start:
            yield range(start, index)
        start, size = (start, size + numel) if fits else (index, numel)
    if values:
        yield range(start, len(values))


def _alike(
    one: int,
    other: int,
    updates: Sequence[Update],
    values: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    states: Sequence[State],
    bars: Sequence[State],
) -> bool:
    """Whether two parameters differ in nothing but their entries."""
    (rule, options), (other_rule, other_options) = updates[one], updates[other]
    a, b = values[one], values[other]
    return (
        rule is other_rule
        and rule.elementwise
        and options is other_options
        and gradients[one] is not None
        and gradients[other] is not None
        and (a.dtype, a.device) == (b.dtype, b.device)
        # a state of one number for each of them has the shape of a 0-dim parameter
        and (a.dim() > 0 or b.dim() > 0)
        and bars[one].keys() == bars[other].keys()
        and states[one].keys() == states[other].keys()
        and all(
            v.shape == a.shape and states[other][key].shape == b.shape
            if differentiable(key, v)
            else _same(v, states[other][key])
            for key, v in states[one].items()
        )
        and all(v.numel() == a.numel() for v in bars[one].values())
        and all(v.numel() == b.numel() for v in bars[other].values())
    )


def _same(a: Any, b: Any) -> bool:
    """Whether two entries are equal, as far as can be told without waiting for a device."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        return both and a.is_cpu and b.is_cpu and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def flat(run: range, tensors: Sequence[Tensor | None]) -> Tensor:
    """The tensors of a run end to end."""
    return torch.cat([tensors[i].reshape(-1) for i in run])  # type: ignore[union-attr]


def joined_states(run: range, states: Sequence[State]) -> State:
    """The states of a run as the state of one vector."""
    return {
        key: flat(run, [s.get(key) for s in states]) if differentiable(key, v) else v
        for key, v in states[run.start].items()
    }


def joined(
    run: range,
    values: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    states: Sequence[State],
) -> tuple[Tensor, Tensor, State]:
    """Parameter, gradient and state of a run as those of one vector."""
    return flat(run, values), flat(run, gradients), joined_states(run, states)
