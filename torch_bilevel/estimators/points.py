"""Going to other points: where the inner steps of a window started, and where the last ones did.

Directions that remember are all taken at the points the inner steps started from, so that y and x
move together from the old point, as the theory of single-loop methods has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import BilevelError, NoInnerStep
from ..inner import StepRecord
from ..problem import BilevelProblem, Call, WeightedCall
from .base import Estimator, Situation

if TYPE_CHECKING:
    from .memory import DirectionMemory


@contextlib.contextmanager
def at_point(problem: BilevelProblem, x: Tensor, y: Tensor) -> Iterator[None]:
    """Both levels at other values, given flat; put back at exit, also by exception."""
    with problem.inner.swapped(), problem.outer.swapped():
        problem.inner.overwrite(problem.inner.layout.split(y))
        problem.outer.overwrite(problem.outer.layout.split(x))
        yield


def walk(
    situation: Situation, last: bool = False
) -> Iterator[tuple[StepRecord, Tensor]]:
    """Overwrite the inner parameters with where each recorded step started, oldest first.

    To be used inside ``problem.inner.swapped()``, which puts them back.

    Args:
        situation: problem and window.
        last: only the last step.

    Yields:
        The step and y, flat.

    Raises:
        NoInnerStep: the window was recorded for another estimator.
    """
    problem = situation.problem
    if problem.initial:
        raise BilevelError(
            "A parameter is in both optimizers (an initialisation). Directions that remember the "
            "last point (SOBA, MRBO, ...) are for one long inner loop; use 'unrolled' for tasks."
        )
    for step in situation.window.steps()[-1 if last else 0 :]:
        if not step.has_iterate:
            raise NoInnerStep(
                "The steps since the last outer step were recorded for an estimator that "
                "keeps no iterates. Set optimizer.estimator before the steps it is to use."
            )
        values = step.values()
        problem.inner.overwrite(values)
        yield step, problem.inner.layout.flatten(values).clone()


def check_memory(
    estimator: Estimator, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Refuse several inner optimizers where gradients are rewritten.

    Raises:
        BilevelError: there are several.
    """
    if estimator.directs and len(optimizers) > 1:
        raise BilevelError(
            f"{estimator} replaces the gradient of the whole inner problem before its step, and "
            f"there are {len(optimizers)} inner optimizers that step one after the other. Use one "
            "optimizer with parameter groups."
        )


def present(step: StepRecord) -> Call:
    """The only call of a step, whose batch is looked up in a table.

    Raises:
        BilevelError: the step accumulated several.
    """
    if len(step.calls) != 1:
        raise BilevelError(
            f"Inner step {step.index} accumulated {len(step.calls)} calls, and a SAGA table has a "
            "row for the batch of one. Use larger batches instead of accumulation."
        )
    return step.calls[0][0]


def direct(memory: DirectionMemory, situation: Situation, step: StepRecord) -> None:
    """Replace the inner gradients in ``.grad`` by the remembered direction."""
    problem = situation.problem
    layout = problem.inner.layout
    known = situation.memory.directions.setdefault("inner", {})
    x, y = problem.outer.read(), problem.inner.read()
    gradients = [p.grad for p in problem.inner.tensors]
    there = [g is not None for g in gradients]

    def field(calls: Sequence[WeightedCall]) -> Tensor:
        """What the loop would step along: the gradient, after its declared transform."""
        parts = problem.inner_gradients(calls, once=True)
        return layout.flatten(
            situation.loop.transformed(parts, there, problem.inner.tensors)
        )

    def old() -> Tensor:
        with at_point(problem, state["x"], state["y"]):
            return field(step.calls)

    state = memory.begin(known)
    if memory.refreshes(state):
        (everything,) = situation.sampler.ticket(step, full=True).samples("all", 1)
        new = field(everything)
    else:
        new = layout.flatten([None if g is None else g.detach() for g in gradients])
    d = memory.direction(
        state, new, old, lambda: situation.sampler.number(present(step))
    )
    if memory.looks_back:
        state["x"], state["y"] = x, y
    known.update(state)
    for gradient, part in zip(gradients, layout.split(d), strict=True):
        if gradient is not None:
            gradient.copy_(part)
