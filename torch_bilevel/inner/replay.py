"""Reverse mode through recorded steps, one step's graph at a time.

For k = K−1 … 0, with the adjoint (ȳ, s̄) of (y_{k+1}, s_{k+1}):

    G, its graph       ∇_y g at y_k, evaluated again
    (ȳ, Ḡ, s̄)         vector-Jacobian product of the update rule at (y_k, G, s_k), G detached
    ȳ ← ȳ + H Ḡ        x̄ ← x̄ + J Ḡ        one backward pass through the graph of G

Memory is the recorded iterates and the graph of one step, never the graph of the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OpaqueStep, ReplayMismatch
from ..problem import BilevelProblem
from .rule import UpdateRule
from .trajectory import StepRecord
from .transforms import GradientTransform
from .verification import consumed, tolerance

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
        inner: adjoint of the first iterate, flat.
        outer: Σ J Ḡ, flat: the implicit part of the hypergradient.
        reached: per outer tensor, whether any step depends on it.
        mismatch: per step, how far the rule is from what the optimizer did.
        steps: the records they belong to.
    """

    inner: Tensor
    outer: Tensor
    reached: list[bool]
    mismatch: list[Tensor]
    steps: list[StepRecord]

    def check(self, problem: BilevelProblem) -> None:
        """Refuse if a rule did not reproduce a recorded step.

        Raises:
            ReplayMismatch: with the step and the relative error.
        """
        if not self.mismatch:
            return
        errors = torch.stack([m.to(self.outer.device) for m in self.mismatch]).tolist()
        for error, record in zip(errors, self.steps, strict=True):
            if not error <= tolerance(problem, record.calls):
                raise ReplayMismatch(
                    f"Replaying inner step {record.index} of this window does not give the "
                    f"parameters the optimizer produced: the difference is {error:.2e} of the "
                    "step. The gradient of this step was changed after backward() (clipping "
                    "without optimizer.gradient_transform(...), a hook), a parameter was "
                    "written to by something else than the optimizer, or a term outside the "
                    "registered losses was added after the first step."
                )


def reverse(
    problem: BilevelProblem,
    steps: Sequence[StepRecord],
    earlier: Sequence[StepRecord],
    rules: Sequence[UpdateRule],
    transform: GradientTransform | None,
    adjoint: Tensor,
) -> Reversed:
    """Pull an adjoint of the present iterate back over recorded steps.

    Args:
        problem: the problem; its parameters are put back at exit, also by exception.
        steps: the steps to differentiate, oldest first.
        earlier: steps before them, back to the one whose iterate was recorded.
        rules: the update rule of each inner optimizer.
        transform: what the loop does to gradients between backward and step.
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
        [False] * len(problem.outer.tensors),
        [],
        [],
    )
    first = len(earlier)
    records = [*earlier, *steps]
    stepper = Stepper(problem, rules, transform)
    value_adjoint = _split(layout, adjoint)
    state_adjoint: list[dict[str, Tensor]] = [{} for _ in value_adjoint]
    following: Sequence[Tensor] = [t.detach().clone() for t in problem.inner.tensors]
    with problem.inner.swapped():
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
                value_adjoint, gradient_adjoint, state_adjoint, error = (
                    stepper.pull_back(
                        record, point, at.parts, value_adjoint, state_adjoint, following
                    )
                )
                hv, jv = at.joint(layout.flatten(gradient_adjoint))
                value_adjoint = [
                    known + part
                    for known, part in zip(
                        value_adjoint, _split(layout, hv), strict=True
                    )
                ]
                result.outer = result.outer + jv
                result.reached = [
                    a or b for a, b in zip(result.reached, at.reached, strict=True)
                ]
                result.mismatch.append(error)
                result.steps.append(record)
                following = point.values
            end = begin
    result.inner = layout.flatten(value_adjoint)
    return result


def _split(layout: Any, vector: Tensor) -> list[Tensor]:
    """Parts of a vector in the vector's own dtype (rules are differentiated in it)."""
    return [
        piece.view(shape).to(device)
        for piece, shape, device in zip(
            torch.split(vector, layout.sizes),
            layout.shapes,
            layout.devices,
            strict=True,
        )
    ]


class Stepper:
    """Applies and differentiates the update rules of recorded steps.

    Args:
        problem: the problem, at whose parameters gradients are evaluated.
        rules: the update rule of each inner optimizer.
        transform: the loop's gradient transform.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        rules: Sequence[UpdateRule],
        transform: GradientTransform | None,
    ):
        self.problem = problem
        self.rules = rules
        self.transform = transform

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
            points.append(Point(values, states))
        return points

    def apply(
        self,
        record: StepRecord,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        states: States,
    ) -> tuple[list[Tensor], States]:
        """(y_{k+1}, s_{k+1}) from (y_k, G, s_k), for every parameter."""
        present = [
            there for i in sorted(record.parts) for there in record.parts[i].present
        ]
        used = consumed(gradients, present, values, self.transform)
        new_values, new_states = [], []
        index = 0
        for number in sorted(record.parts):
            part = record.parts[number]
            for group in part.groups:
                value, gradient, state = values[index], used[index], states[index]
                if gradient is not None:
                    value, state = self.rules[number].step(
                        value, gradient, state, part.hyper[group]
                    )
                new_values.append(value)
                new_states.append(state)
                index += 1
        return new_values, new_states

    def pull_back(
        self,
        record: StepRecord,
        point: Point,
        gradients: Sequence[Tensor | None],
        value_adjoint: Sequence[Tensor],
        state_adjoint: Sequence[dict[str, Tensor]],
        following: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor | None], list[dict[str, Tensor]], Tensor]:
        """Vector-Jacobian product of the rules at a detached gradient.

        Returns:
            Adjoints of values, gradients and states, and how far the rule's value is from
            the recorded next parameters, relative to the step.
        """
        dtype = self.problem.inner.layout.dtype

        def leaf(tensor: Tensor, device: torch.device) -> Tensor:
            return tensor.detach().to(device, dtype).requires_grad_()

        devices = [value.device for value in point.values]
        values = [leaf(v, d) for v, d in zip(point.values, devices, strict=True)]
        grads = [
            None if g is None else leaf(g, d)
            for g, d in zip(gradients, devices, strict=True)
        ]
        states = [
            {
                k: leaf(v, d) if isinstance(v, Tensor) and k != "step" else v
                for k, v in state.items()
            }
            for state, d in zip(point.states, devices, strict=True)
        ]
        with torch.enable_grad():
            new_values, new_states = self.apply(record, values, grads, states)
        outputs, weights = list(new_values), list(value_adjoint)
        for state, adjoints in zip(new_states, state_adjoint, strict=True):
            for key, weight in adjoints.items():
                outputs.append(state[key])
                weights.append(weight)
        flat_states = [t for s in states for t in s.values() if _tracked(t)]
        inputs = [*values, *(g for g in grads if g is not None), *flat_states]
        pairs = [
            (o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad
        ]
        found = torch.autograd.grad(
            [o for o, _ in pairs], inputs, [w for _, w in pairs], allow_unused=True
        )
        adjoint = dict(zip(map(id, inputs), found, strict=True))
        return (
            [_or_zero(adjoint[id(v)], v) for v in values],
            [None if g is None else adjoint[id(g)] for g in grads],
            [
                {k: _or_zero(adjoint[id(t)], t) for k, t in s.items() if _tracked(t)}
                for s in states
            ],
            _error(new_values, following, point.values, dtype),
        )


def _tracked(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _or_zero(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value


@torch.no_grad()
def _error(
    predicted: Sequence[Tensor],
    actual: Sequence[Tensor],
    before: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """‖predicted − actual‖ beyond rounding, relative to ‖actual − before‖."""
    device = actual[0].device

    def norm(tensors: list[Tensor]) -> Tensor:
        norms = [torch.linalg.vector_norm(t).to(device, dtype) for t in tensors]
        return torch.linalg.vector_norm(torch.stack(norms))

    eps = max(torch.finfo(a.dtype).eps for a in actual)
    actual = [a.to(p.device) for a, p in zip(actual, predicted, strict=True)]
    off = norm([p - a for p, a in zip(predicted, actual, strict=True)])
    moved = norm([a - b.to(a.device) for a, b in zip(actual, before, strict=True)])
    rounding = 8 * eps * norm(list(actual))
    return torch.where(off <= rounding, torch.zeros_like(off), off / moved)
