"""Recorded steps, taken again: forwards as they were, backwards with adjoints.

Going backwards needs the points in reverse order. From one recorded iterate the n points up to the
next are made again with room for few of them, by the binomial schedule of Griewank & Walther
(2000): with c points kept, n ≤ C(c + r, c) steps are reversed by stepping each at most r times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..problem import BilevelProblem, gradients
from .adjoint import Adjoint, pull_back, relative, total
from .hyperparameters import HyperAdjoint, groups_of
from .loop import Loop
from .pool import Pool
from .rule import Hyper, UpdateRule
from .runs import flat, joined, joined_states, runs
from .trajectory import StepRecord, copy_states, tensors_of

States = list[dict[str, Any]]


@dataclass
class Point:
    """Parameters and optimizer state before a step."""

    values: Sequence[Tensor]
    states: States


def split(count: int, room: int) -> int:
    """Where to keep the next point on the way back over ``count`` steps.

    Args:
        count: steps to go back over, at least 2.
        room: points that may be kept besides the first, at least 1.

    Returns:
        How many steps to take before keeping a point; the choice that takes fewest steps in all.
    """
    repeats = 1
    while math.comb(room + repeats, room) < count:
        repeats += 1
    fewest = math.comb(room + repeats - 2, room) if repeats > 1 else 0
    return max(1, fewest, count - math.comb(room - 1 + repeats, room - 1))


class Stepper:
    """Applies and differentiates the update rules of recorded steps.

    Args:
        problem: the problem, at whose parameters gradients are evaluated.
        rules: the update rule of each inner optimizer.
        loop: what was declared about the loop.
        pool: where iterates that are stepped through again are kept for a moment.
        moved: the outer variables are not where they were, so hyperparameters that depend on them
            are evaluated again instead of taken from the records.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        rules: Sequence[UpdateRule],
        loop: Loop,
        pool: Pool,
        moved: bool = False,
    ):
        self.problem = problem
        self.rules = rules
        self.loop = loop
        self.pool = pool
        self.moved = moved
        self._last: Sequence[Tensor] = ()  # values of a point that is done with

    def start(self, record: StepRecord) -> Point:
        """The recorded point before a step."""
        # A record may hold its iterate on another device (offload).
        pairs = zip(record.values(), self.problem.inner.tensors, strict=True)
        return Point([v.to(p.device) for v, p in pairs], record.states())

    def forward(self, records: Sequence[StepRecord], point: Point) -> Point:
        """The point after the records, stepped through again from the one before them."""
        before: Point | None = None
        for record in records:
            point = self._step(record, point)
            if before is not None:
                self.pool.give_back(tensors_of(before.values, before.states))
            before = point
        return point

    def _step(self, record: StepRecord, point: Point) -> Point:
        """The point after a step; what it takes besides is gone before the next begins."""
        self.problem.inner.overwrite(point.values)
        values: list[Tensor] = []
        states: States = []
        # with the user's own kernels, to arrive at the iterate the loop arrived at
        gradients = self.problem.inner_gradients(record.calls, once=True)
        with torch.no_grad():
            moved = self.apply(record, point.values, gradients, point.states)
            del gradients
            for value, state in moved:
                values += self.pool.copy([value])
                states += copy_states([state], self.pool)
        return Point(values, states)

    def backward(
        self, records: Sequence[StepRecord], begin: int, end: int
    ) -> Iterator[tuple[int, Point]]:
        """The points before records[end − 1], …, records[begin], which has its iterate.

        At most about √(end − begin) of them exist at a time, for half a gradient a step or one more
        than if all did. The values of a point stand until the next but one.
        """
        start = self.start(records[begin])
        return self._between(records, begin, end, start, math.isqrt(end - begin))

    def _between(
        self,
        records: Sequence[StepRecord],
        begin: int,
        end: int,
        start: Point,
        room: int,
    ) -> Iterator[tuple[int, Point]]:
        while end - begin > 1:
            middle = begin + split(end - begin, room)
            point = self.forward(records[begin:middle], start)
            yield from self._between(records, middle, end, point, room - 1)
            self.pool.give_back([*tensors_of((), point.states), *self._last])
            self._last = point.values
            end = middle
        yield begin, start

    def apply(
        self,
        record: StepRecord,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        states: States,
    ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """(y_{k+1}, s_{k+1}) from (y_k, G, s_k), each parameter's as it is asked for.

        To be consumed under ``no_grad``.
        """
        used = self.loop.consumed(gradients, record.present(), values)
        del gradients  # each is let go once it is used
        groups = list(groups_of(record.parts))
        if self.moved and self.loop.hyperparameters is not None:
            found = self.loop.hyperparameters.numbers(record.position, groups)
            groups = [{**a, **b} for a, b in zip(groups, found, strict=True)]
        updates = self.updates(record, HyperAdjoint(None, 0, groups))
        for (rule, hyper), value, state in zip(updates, values, states, strict=True):
            gradient = used.pop(0)
            if gradient is not None:
                value, state = rule.step(value, gradient, state, hyper)
            yield value, state

    def unexplained(self, records: Sequence[StepRecord], record: StepRecord) -> float:
        """How far a step is from what the rule gives with the user's own kernels, relative to it.

        The kernels of a replay are twice differentiable and round differently. Where that moves an
        activation across a kink (a ReLU at zero) the gradient jumps, and Adam, which divides by
        |g|, magnifies the rounding of a tiny one. So the gradient is evaluated as the loop did; and
        again at y rounded by ε, and 64 times what that does to a parameter is taken off its
        difference, for iterates that were stepped through again.

        Args:
            records: steps from one with an iterate on, the given one among them.
            record: the step.
        """
        end = next(i for i, r in enumerate(records) if r is record)
        begin = end
        while not records[begin].has_iterate:
            begin -= 1
        layout = self.problem.inner.layout
        with self.problem.inner.swapped() as present:
            actual: Sequence[Tensor] = present
            if end + 1 < len(records):
                if not records[end + 1].has_iterate:
                    return 0.0  # nothing was recorded that it could differ from
                actual = self.start(records[end + 1]).values
            point = self.forward(records[begin:end], self.start(records[begin]))
            self.problem.inner.overwrite(point.values)
            g = layout.flatten(self.problem.inner_gradients(record.calls, once=True))
            y = layout.flatten(point.values)
            signs = torch.arange(len(y), device=y.device) % 2 * 2 - 1
            eps = max(torch.finfo(value.dtype).eps for value in point.values)
            self.problem.inner.overwrite(layout.split(y * (1 + 2 * eps * signs)))
            moved = self.problem.inner_gradients(record.calls, once=True)
            moved = layout.flatten(moved) + eps * g.abs()
        with torch.no_grad():
            exact, other = (
                layout.flatten(
                    [
                        value
                        for value, _ in self.apply(
                            record, point.values, layout.split(vector), point.states
                        )
                    ]
                )
                for vector in (g, moved)
            )
            off, rounding = (
                torch.stack([torch.linalg.vector_norm(part) for part in parts])
                for parts in (
                    torch.split(exact - layout.flatten(actual), layout.sizes),
                    torch.split(exact - other, layout.sizes),
                )
            )
            beyond = torch.linalg.vector_norm((off - 64 * rounding).clamp(min=0.0))
            return float(beyond / torch.linalg.vector_norm(exact - y))

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
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Pull the adjoint through a step's rules at a detached gradient, in place.

        Returns:
            How far the rules' values are from the recorded next parameters, relative to the
            step; and what outer variables receive that determine hyperparameters or how the
            gradient is transformed.
        """
        raw = [
            None if g is None else g.detach().to(v.device, bar.values.dtype)
            for g, v in zip(gradients, point.values, strict=True)
        ]
        with torch.no_grad():
            used = self.loop.consumed(raw, record.present(), point.values)
        norms: list[Tensor] = []
        updates = self.updates(record, hyper)
        gradient_bars = bar.parts(bar.gradient)
        for run in runs(updates, point.values, used, point.states, bar.states):
            first, (rule, options) = run[0], updates[run[0]]
            g = used[first]
            if g is None:  # torch skipped it: nothing happened
                gradient_bars[first].zero_()
                continue
            where = point.values[first], g, point.states[first]
            after, before = following[first], bar.states[first]
            if len(run) > 1:
                where = joined(run, point.values, used, point.states)
                after, before = flat(run, following), joined_states(run, bar.states)
            before, found = pull_back(
                rule,
                options,
                where,
                after,
                bar.slice(bar.values, run),
                bar.slice(bar.gradient, run),
                before,
                hyper.leaves,
                hyper.bars,
            )
            bar.put_state(run, before)
            norms += found
        if self.loop.proximal is not None:  # λ (y − a) was added to the gradient
            bar.values.add_(bar.gradient, alpha=self.loop.proximal.weight)
            bar.pull_anchor(-self.loop.proximal.weight)
        direct = hyper.to_outer(self.problem.outer.tensors)
        if self.loop.transforms:
            found = self._through_transform(record, point, raw, gradient_bars)
            pairs = zip(direct, found, strict=True)
            direct = [b if a is None else a if b is None else a + b for a, b in pairs]
        live = [k for k, gradient in enumerate(used) if gradient is not None]
        if not live:  # no gradient was there to be consumed
            return point.values[0].new_zeros(()), direct
        return _mismatch(total(norms), point.values, following, live), direct

    def _through_transform(
        self,
        record: StepRecord,
        point: Point,
        raw: Sequence[Tensor | None],
        bars: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """Pull adjoints of the transformed gradients back to the raw ones, in place.

        Returns:
            Per outer tensor, what it receives because the transform depends on it.
        """
        leaves = [None if g is None else g.detach().requires_grad_() for g in raw]
        with torch.enable_grad():
            used = self.loop.transformed(leaves, record.present(), point.values)
        pairs = [
            (u, bar.view(u.shape).to(u.device))
            for u, bar in zip(used, bars, strict=True)
            if u is not None and u.requires_grad
        ]
        new, direct = gradients(
            [u for u, _ in pairs],
            [a for _, a in pairs],
            leaves,
            self.problem.direct,
        )
        for part, bar in zip(new, bars, strict=True):
            if part is None:
                bar.zero_()
            else:
                bar.copy_(part.reshape(-1))
        return direct


@torch.no_grad()
def _mismatch(
    off: Tensor, values: Sequence[Tensor], following: Sequence[Tensor], live: list[int]
) -> Tensor:
    """`mismatch` of a step whose rules' values are off the recorded ones by a norm.

    Args:
        off: the norm.
        values: the parameters before the step.
        following: those recorded after it.
        live: which parameters moved.
    """
    if off.is_cpu and not off:  # nothing that would have to be set in relation
        return off
    eps = max(torch.finfo(value.dtype).eps for value in values)
    after, before = (
        torch.cat([parts[k].reshape(-1).to(off) for k in live])
        for parts in (following, values)
    )
    norm = torch.linalg.vector_norm
    return relative(off, norm(after - before), norm(after), eps)
