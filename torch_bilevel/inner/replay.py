"""Reverse mode through recorded steps, one step's graph at a time.

For k = K−1 … 0, with the adjoint (ȳ, s̄) of (y_{k+1}, s_{k+1}):

    G, its graph       ∇_y g at y_k, evaluated again
    (ȳ, Ḡ, s̄)         vector-Jacobian product of the update rule at (y_k, G, s_k), G detached
    ȳ ← ȳ + H Ḡ        x̄ ← x̄ + J Ḡ        one backward pass through the graph of G

Memory is the recorded iterates and the graph of one step, never the graph of the loop. Where only
every c-th iterate was recorded, those between are stepped through again (`Stepper.backward`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFinite, ReplayMismatch
from ..problem import BilevelProblem
from ..products import disagreement
from .adjoint import Adjoint
from .loop import Loop
from .pool import Pool
from .rule import UpdateRule
from .stepper import Point, Stepper
from .trajectory import StepRecord
from .verification import KINK, refuse_unexplained


@dataclass
class Reversed:
    """What going back over the steps gives.

    Attributes:
        inner: adjoint of the first iterate, and of what a proximal term pulls to, flat.
        outer: Σ J Ḡ, flat: the implicit part of the hypergradient.
        reached: per outer tensor, whether any step depends on it.
        mismatch: per step, how far the rule is from what the optimizer did.
        steps: the records they belong to.
        unexplained: the mismatch of the i-th of them with the user's own kernels.
    """

    inner: Tensor
    outer: Tensor
    reached: list[bool]
    mismatch: list[Tensor]
    steps: list[StepRecord]
    unexplained: Callable[[int], float]


def check_mismatch(
    errors: Sequence[Tensor],
    numbers: Sequence[int | range],
    bounds: Sequence[float],
    unexplained: Callable[[int], float] | None = None,
) -> None:
    """Refuse if a rule did not reproduce a recorded step.

    Args:
        errors: per step, how far the rule is from what the optimizer did.
        numbers: of the steps in the window; a range where several were taken in one go.
        bounds: per step, how far it may be: the `tolerance` of what it was computed in.
        unexplained: the error of the i-th of these steps with the user's own kernels; asked where
            an error exceeds the tolerance and is smaller than `KINK`.

    Raises:
        ReplayMismatch: with the step and the relative error.
        NonFinite: a step is not finite.
    """
    if not errors:
        return
    device = errors[0].device
    found = torch.stack([error.to(device) for error in errors]).tolist()
    for index, (error, number, bound) in enumerate(
        zip(found, numbers, bounds, strict=True)
    ):
        if not error <= bound and error < KINK and unexplained is not None:
            error = unexplained(index)
        if not error <= bound:
            if math.isnan(error):
                raise NonFinite(
                    f"Inner step {number} of this window is not finite: the inner parameters "
                    "have probably diverged. Look at the training loss, and lower the inner "
                    "learning rate."
                )
            several = isinstance(number, range)
            where = f"s {number[0]} to {number[-1]}" if several else f" {number}"
            raise ReplayMismatch(
                f"Replaying inner step{where} of this window does not give the "
                f"parameters the optimizer produced: the difference is {error:.2e} of the "
                f"{'way' if several else 'step'}. The gradient of "
                f"{'a' if several else 'this'} step was changed after backward() (clipping "
                "without optimizer.gradient_transform(...), a hook), a parameter was "
                "written to by something else than the optimizer (or in a step inside paused()), "
                "gradients were left over from the step before (no zero_grad()), or a term "
                "outside the registered losses was added after the first step."
            )


def reverse(
    problem: BilevelProblem,
    steps: Sequence[StepRecord],
    earlier: Sequence[StepRecord],
    rules: Sequence[UpdateRule],
    loop: Loop,
    adjoint: Tensor,
) -> Reversed:
    """Pull an adjoint of the present iterate back over recorded steps.

    Args:
        problem: the problem; its parameters are put back at exit, also by exception.
        steps: the steps to differentiate, oldest first.
        earlier: steps before them, back to the one whose iterate was recorded.
        rules: the update rule of each inner optimizer.
        loop: what was declared about the loop.
        adjoint: ∂_y f at the present iterate, flat.

    Returns:
        The adjoints of the outer variables and of the first iterate.

    Raises:
        OpaqueStep: a step evaluated its closure several times.
        ReplayMismatch: the state of an optimizer was written to between two steps.
    """
    refuse_unexplained([*earlier, *steps])
    layout = problem.inner.layout
    result = Reversed(
        adjoint,
        problem.outer.layout.zeros(),
        [tensor is None for tensor in problem.direct],
        [],
        [],
        lambda index: stepper.unexplained(records, result.steps[index]),
    )
    first = len(earlier)
    records = [*earlier, *steps]
    stepper = Stepper(problem, rules, loop, Pool())
    bar = Adjoint(layout, adjoint)
    with problem.inner.swapped() as following:
        end = len(records)
        while end > first:
            # the segment from the last recorded iterate before `end`, stepped through again
            begin = end - 1
            while not records[begin].has_iterate:
                begin -= 1
            for index, point in stepper.backward(records, begin, end):
                record = records[index]
                _check_kept(problem, record, point)
                at = problem.kept(record.calls)
                if at is None:
                    problem.inner.overwrite(point.values)
                    at = problem.linearize(record.calls)
                hyper = stepper.hyper(record)
                error, direct = stepper.pull_back(
                    record, point, at.parts, bar, hyper, following
                )
                at.add_joint(bar.gradient, bar.values, result.outer)
                problem.outer.layout.add(result.outer, direct)
                result.reached = [
                    known or there or part is not None
                    for known, there, part in zip(
                        result.reached, at.reached, direct, strict=True
                    )
                ]
                result.mismatch.append(error)
                result.steps.append(record)
                following = point.values
                del at  # before the next step's graph is built
                if index == first:
                    break
            end = begin
    result.inner = bar.initial()
    return result


def _check_kept(problem: BilevelProblem, record: StepRecord, point: Point) -> None:
    """Compare the graphs kept of a step with a new one, once for every loss.

    Raises:
        ReplayMismatch: their products differ.
    """
    new = [call.function for call, _ in record.calls if call.kept is not None]
    if all(function in problem.kept_right for function in new):
        return
    kept = problem.kept(record.calls)
    if kept is None:
        return
    # asked while the parameters have moved on, as they will have later
    products = problem.num_products
    wrong = disagreement(problem, kept, record.calls, point.values)
    problem.num_products = products  # no part of the estimate
    if wrong is not None:
        names = ", ".join(repr(call.name) for call, _ in record.calls)
        raise ReplayMismatch(
            f"The graph kept of {names} at inner step {record.index} of this window gives {wrong}. "
            "Something in it is computed in the backward, from parameters that have moved since: "
            "torch.utils.checkpoint(use_reentrant=False) does that. Leave keep_graph=True out, or "
            "the checkpoint, which saves no memory here."
        )
    for function in new:
        problem.kept_right.add(function)
