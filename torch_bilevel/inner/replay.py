"""Reverse mode through recorded steps, one step's graph at a time.

For k = K−1 … 0, with the adjoint (ȳ, s̄) of (y_{k+1}, s_{k+1}):

    G, its graph       ∇_y g at y_k, evaluated again
    (ȳ, Ḡ, s̄)         vector-Jacobian product of the update rule at (y_k, G, s_k), G detached
    ȳ ← ȳ + H Ḡ        x̄ ← x̄ + J Ḡ        one backward pass through the graph of G

Memory is the recorded iterates and the graph of one step, never the graph of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OpaqueStep, ReplayMismatch
from ..problem import BilevelProblem
from .adjoint import Adjoint, mismatch, pull_back
from .hyperparameters import HyperAdjoint, groups_of
from .loop import Loop
from .pool import Pool
from .rule import Hyper, UpdateRule
from .trajectory import StepRecord, copy_states, tensors_of
from .verification import consumed

States = list[dict[str, Any]]


@dataclass
class Point:
    """Parameters and optimizer state before a step."""

    values: Sequence[Tensor]
    states: States


@dataclass
class Reversed:
    """What going back over the steps gives.

    Attributes:
        inner: adjoint of the first iterate, and of what a proximal term pulls to, flat.
        outer: Σ J Ḡ, flat: the implicit part of the hypergradient.
        reached: per outer tensor, whether any step depends on it.
        mismatch: per step, how far the rule is from what the optimizer did.
        steps: the records they belong to.
        rounding: how far rounding of its gradient moves the i-th of them, relative to it.
    """

    inner: Tensor
    outer: Tensor
    reached: list[bool]
    mismatch: list[Tensor]
    steps: list[StepRecord]
    rounding: Callable[[int], float]


def check_mismatch(
    errors: Sequence[Tensor],
    numbers: Sequence[int],
    bounds: Sequence[float],
    rounding: Callable[[int], float] = lambda step: 0.0,
) -> None:
    """Refuse if a rule did not reproduce a recorded step.

    Args:
        errors: per step, how far the rule is from what the optimizer did.
        numbers: of the steps in the window.
        bounds: per step, how far it may be: the `tolerance` of what it was computed in.
        rounding: how far rounding of the gradient moves the i-th of these steps, relative to it;
            asked where an error exceeds the tolerance.

    Raises:
        ReplayMismatch: with the step and the relative error.
    """
    if not errors:
        return
    device = errors[0].device
    found = torch.stack([error.to(device) for error in errors]).tolist()
    for index, (error, number, bound) in enumerate(
        zip(found, numbers, bounds, strict=True)
    ):
        # Adam divides by |g|: near a minimum it magnifies the rounding of a tiny gradient.
        if not error <= bound and not error <= 64 * rounding(index):
            raise ReplayMismatch(
                f"Replaying inner step {number} of this window does not give the "
                f"parameters the optimizer produced: the difference is {error:.2e} of the "
                "step. The gradient of this step was changed after backward() (clipping "
                "without optimizer.gradient_transform(...), a hook), a parameter was "
                "written to by something else than the optimizer, gradients were left over "
                "from the step before (no zero_grad()), or a term outside the registered "
                "losses was added after the first step."
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
    """
    for record in steps:
        if record.opaque:
            raise OpaqueStep(
                f"Inner step {record.index} evaluated its closure several times, so it is not "
                "one application of an update rule and cannot be unrolled. Use an implicit "
                "estimator such as 'cg', which uses the last evaluation."
            )
    layout = problem.inner.layout
    result = Reversed(
        layout.zeros(),
        problem.outer.layout.zeros(),
        [tensor is None for tensor in problem.direct],
        [],
        [],
        lambda index: stepper.rounding(records, result.steps[index]),
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
            points = stepper.forward(records[begin:end])
            for index in range(end - 1, max(begin, first) - 1, -1):
                record, point = records[index], points[index - begin]
                problem.inner.overwrite(point.values)
                at = problem.linearize(record.calls)
                hyper = stepper.hyper(record)
                error = stepper.pull_back(
                    record, point, at.parts, bar, hyper, following
                )
                hv, jv = at.joint(bar.gradient, last=True)
                bar.values += hv
                result.outer += jv
                direct = hyper.to_outer(problem.outer.tensors)
                if hyper.leaves:
                    result.outer += problem.outer.layout.flatten(direct)
                result.reached = [
                    known or there or part is not None
                    for known, there, part in zip(
                        result.reached, at.reached, direct, strict=True
                    )
                ]
                result.mismatch.append(error)
                result.steps.append(record)
                following = point.values
                del at, hv, jv  # before the next step's graph is built
            end = begin
            for point in points[1:]:  # the first is the record's own
                stepper.pool.give_back(tensors_of(point.values, point.states))
            del points
    result.inner = bar.values + bar.anchor
    return result


class Stepper:
    """Applies and differentiates the update rules of recorded steps.

    Args:
        problem: the problem, at whose parameters gradients are evaluated.
        rules: the update rule of each inner optimizer.
        loop: what was declared about the loop.
        pool: where iterates that are stepped through again are kept for a moment.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        rules: Sequence[UpdateRule],
        loop: Loop,
        pool: Pool,
    ):
        self.problem = problem
        self.rules = rules
        self.loop = loop
        self.pool = pool

    def forward(self, records: Sequence[StepRecord]) -> list[Point]:
        """The points before each of the records, the first of which has its iterate."""
        # A record may hold its iterate on another device (offload).
        values = [
            v.to(p.device)
            for v, p in zip(
                records[0].values(), self.problem.inner.tensors, strict=True
            )
        ]
        points = [Point(values, records[0].states())]
        for record in records[:-1]:
            self.problem.inner.overwrite(points[-1].values)
            gradients = self.problem.inner_gradients(record.calls)
            with torch.no_grad():
                values, states = self.apply(
                    record, points[-1].values, gradients, points[-1].states
                )
            points.append(Point(self.pool.copy(values), copy_states(states, self.pool)))
        return points

    def apply(
        self,
        record: StepRecord,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        states: States,
    ) -> tuple[list[Tensor], States]:
        """(y_{k+1}, s_{k+1}) from (y_k, G, s_k), for every parameter."""
        used = self.loop.consumed(gradients, record.present(), values)
        new_values, new_states = [], []
        for (rule, hyper), value, gradient, state in zip(
            self.updates(record, HyperAdjoint(None, 0, list(groups_of(record.parts)))),
            values,
            used,
            states,
            strict=True,
        ):
            if gradient is not None:
                value, state = rule.step(value, gradient, state, hyper)
            new_values.append(value)
            new_states.append(state)
        return new_values, new_states

    def rounding(self, records: Sequence[StepRecord], record: StepRecord) -> float:
        """How far rounding of the gradient can move a step, relative to the step.

        Rounding y by ε changes the gradient by about ε H y, and the gradient itself is rounded.

        Args:
            records: steps from one with an iterate on, the given one among them.
            record: the step.
        """
        end = next(i for i, r in enumerate(records) if r is record) + 1
        begin = end - 1
        while not records[begin].has_iterate:
            begin -= 1
        layout = self.problem.inner.layout
        with self.problem.inner.swapped():
            point = self.forward(records[begin:end])[-1]
            self.problem.inner.overwrite(point.values)
            at = self.problem.linearize(record.calls)
            y = layout.flatten(point.values)
            signs = torch.arange(len(y), device=y.device) % 2 * 2 - 1
            g = at.gradient
            eps = max(torch.finfo(value.dtype).eps for value in point.values)
            moved = g + eps * (at.hvp(y * signs).abs() + g.abs())
        with torch.no_grad():
            exact, other = (
                layout.flatten(
                    self.apply(
                        record, point.values, layout.split(vector), point.states
                    )[0]
                )
                for vector in (g, moved)
            )
        step = torch.linalg.vector_norm(exact - y)
        return float(torch.linalg.vector_norm(other - exact) / step)

    def hyper(self, record: StepRecord) -> HyperAdjoint:
        """The hyperparameters of a step at the present outer variables."""
        groups = list(groups_of(record.parts))
        return HyperAdjoint(self.loop.hyperparameters, record.position, groups)

    def updates(
        self, record: StepRecord, hyper: HyperAdjoint
    ) -> list[tuple[UpdateRule, Hyper]]:
        """Per parameter, its rule and hyperparameters."""
        found, first = [], 0
        for number in sorted(record.parts):
            part = record.parts[number]
            found += [
                (self.rules[number], hyper.groups[first + g]) for g in part.groups
            ]
            first += len(part.hyper)
        return found

    def pull_back(
        self,
        record: StepRecord,
        point: Point,
        gradients: Sequence[Tensor | None],
        bar: Adjoint,
        hyper: HyperAdjoint,
        following: Sequence[Tensor],
    ) -> Tensor:
        """Pull the adjoint through a step's rules at a detached gradient, in place.

        Returns:
            How far the rules' values are from the recorded next parameters, relative to the
            step.
        """
        raw = [
            None if g is None else g.detach().to(v.device, bar.values.dtype)
            for g, v in zip(gradients, point.values, strict=True)
        ]
        with torch.no_grad():
            used = self.loop.consumed(raw, record.present(), point.values)
        norms: list[Tensor] = []
        gradient_bars = bar.parts(bar.gradient)
        for index, ((rule, options), value, g, state, next_value) in enumerate(
            zip(
                self.updates(record, hyper),
                point.values,
                used,
                point.states,
                following,
                strict=True,
            )
        ):
            if g is None:  # torch skipped it: nothing happened
                gradient_bars[index].zero_()
                continue
            bar.states[index], found = pull_back(
                rule,
                options,
                (value, g, state),
                next_value,
                bar.parts(bar.values)[index],
                gradient_bars[index],
                bar.states[index],
                hyper.leaves,
                hyper.bars,
            )
            norms += found
        if self.loop.proximal is not None:  # λ (y − a) was added to the gradient
            bar.values.add_(bar.gradient, alpha=self.loop.proximal.weight)
            bar.anchor.sub_(bar.gradient, alpha=self.loop.proximal.weight)
        if self.loop.transform is not None:
            self._through_transform(record, point, raw, gradient_bars)
        eps = max(torch.finfo(value.dtype).eps for value in point.values)
        return mismatch(norms, eps)

    def _through_transform(
        self,
        record: StepRecord,
        point: Point,
        raw: Sequence[Tensor | None],
        bars: Sequence[Tensor],
    ) -> None:
        """Pull adjoints of the transformed gradients back to the raw ones, in place."""
        leaves = [None if g is None else g.detach().requires_grad_() for g in raw]
        with torch.enable_grad():
            used = consumed(leaves, record.present(), point.values, self.loop.transform)
        pairs = [
            (u, bar.view(u.shape).to(u.device))
            for u, bar in zip(used, bars, strict=True)
            if u is not None and u.requires_grad
        ]
        inputs = [g for g in leaves if g is not None]
        found = torch.autograd.grad(
            [u for u, _ in pairs], inputs, [a for _, a in pairs], allow_unused=True
        )
        new = iter(found)
        for leaf, bar in zip(leaves, bars, strict=True):
            part = None if leaf is None else next(new)
            if part is None:
                bar.zero_()
            else:
                bar.copy_(part.reshape(-1))
