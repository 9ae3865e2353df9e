"""Recorded steps, run again with the outer variables elsewhere.

    y_K(x + Δ):    y_{k+1} = Φ(y_k, ∇_y g(x + Δ, y_k), s_k; h_k(x + Δ)),    k = 0 … K−1

from the recorded (y_0, s_0), where y_0 moves along if it is part of x (an initialisation), on the
recorded batches and with the recorded random numbers, by the rule of the user's own optimizer.
First derivatives only, and one iterate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..problem import BilevelProblem, gradients
from .adjoint import mismatch, step_norms
from .loop import Loop
from .pool import Pool
from .replay import check_mismatch
from .rule import UpdateRule
from .stepper import Point, Stepper
from .trajectory import StepRecord, tensors_of
from .verification import refuse_unexplained, tolerance


class Rerun:
    """y_K as a function of the outer variables.

    Args:
        problem: the problem; its parameters are put back after every run, also by exception.
        steps: the steps to run again, oldest first.
        earlier: steps before them, back to the one whose iterate was recorded; they are run once,
            at x.
        rules: the update rule of each inner optimizer.
        loop: what was declared about the loop.

    Attributes:
        lost: the largest share of a move that rounding of the outer variables took away.

    Raises:
        OpaqueStep: a step evaluated its closure several times.
        ReplayMismatch: the state of an optimizer was written to between two steps.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        steps: Sequence[StepRecord],
        earlier: Sequence[StepRecord],
        rules: Sequence[UpdateRule],
        loop: Loop,
    ):
        refuse_unexplained([*earlier, *steps])
        self.problem, self.steps = problem, list(steps)
        self._rules, self._loop, self._pool = rules, loop, Pool()
        self.lost = problem.outer.layout.zeros().sum()
        stepper = Stepper(problem, rules, loop, self._pool)
        with problem.inner.swapped():
            begin = stepper.start([*earlier, *steps][0])
            self._start = stepper.forward(earlier, begin)

    def __call__(self, shift: Tensor | None = None) -> Tensor:
        """y_K at the outer variables moved by ``shift``, flat.

        Args:
            shift: flat, of the outer layout; None is no move.
        """
        point, loop, outer = self._start, self._loop, self.problem.outer
        with self.problem.inner.swapped(), outer.swapped():
            if shift is not None:
                self._move_outer(shift)
                point = Point(self._moved(point.values, shift), point.states)
                if loop.proximal is not None:  # it pulls to where the trajectory began
                    anchor = self._moved(loop.proximal.anchor, shift)
                    loop = replace(loop, proximal=replace(loop.proximal, anchor=anchor))
            return self._run(point, loop)

    def _move_outer(self, shift: Tensor) -> None:
        outer, x = self.problem.outer, self.problem.outer.read()
        outer.overwrite(outer.layout.split(x + shift))
        off, size = (
            torch.linalg.vector_norm(v) for v in (outer.read() - x - shift, shift)
        )
        self.lost = torch.maximum(self.lost, off / size)

    def _run(self, point: Point, loop: Loop) -> Tensor:
        stepper = Stepper(self.problem, self._rules, loop, self._pool, moved=True)
        end = stepper.forward(self.steps, point)
        y = self.problem.inner.layout.flatten(end.values)
        self._pool.give_back(tensors_of(end.values, end.states))
        return y

    def _moved(self, values: Sequence[Tensor], shift: Tensor) -> Sequence[Tensor]:
        """Inner values, the initialisations among them moved."""
        if not self.problem.initial:
            return values
        layout = self.problem.inner.layout
        (moved,) = self.problem.to_initial(shift[None])
        return layout.split(layout.flatten(values) + moved)

    def check(self, y: Tensor) -> None:
        """Refuse if a run at the present outer variables does not end at the present y.

        Args:
            y: what the run gave.

        Raises:
            ReplayMismatch: with the relative error.
        """
        layout, eps = self.problem.inner.layout, self.eps
        start = layout.flatten(self._start.values)
        norms = step_norms(y, self.problem.inner.read(), start)
        check_mismatch(
            [mismatch([norms], eps)],
            [range(self.steps[0].index, self.steps[-1].index + 1)],
            [max(tolerance(self.problem, record.calls) for record in self.steps)],
            lambda _: self._unexplained(y, start),
        )

    @property
    def eps(self) -> float:
        """The rounding of the inner parameters' coarsest dtype."""
        tensors = self.problem.inner.tensors
        return max(torch.finfo(tensor.dtype).eps for tensor in tensors)

    def _unexplained(self, y: Tensor, start: Tensor) -> float:
        """The relative error beyond 64 times what rounding the start does to each parameter.

        Runs may amplify rounding: Adam divides by |g|, and chaotic ones by definition.
        """
        layout = self.problem.inner.layout
        signs = torch.arange(len(y), device=y.device) % 2 * 2 - 1
        rounded = start + 2 * self.eps * signs * (start.abs() + y.abs())
        with self.problem.inner.swapped():
            point = Point(layout.split(rounded), self._start.states)
            other = self._run(point, self._loop)
        actual = self.problem.inner.read()
        off, rounding = (
            torch.stack(
                [torch.linalg.vector_norm(p) for p in torch.split(v, layout.sizes)]
            )
            for v in (y - actual, y - other)
        )
        beyond = torch.linalg.vector_norm((off - 64 * rounding).clamp(min=0.0))
        return float(beyond / torch.linalg.vector_norm(actual - start))

    def reached(self, known: Sequence[bool]) -> list[bool]:
        """Per outer tensor, whether the end of the run depends on it, by first derivatives.

        Args:
            known: those that need not be looked for.
        """
        problem, loop = self.problem, self._loop
        nothing = [None] * len(problem.direct)
        found = [a or t is None for a, t in zip(known, problem.direct, strict=True)]
        stepper = Stepper(problem, self._rules, loop, self._pool)
        for record in self.steps:
            if all(found):
                break
            parts, to_outer = self._derivatives(record)
            raw = [None if g is None else g.detach() for g in parts]
            with torch.enable_grad():
                values = [t.detach() for t in problem.inner.tensors]
                used = loop.transformed(raw, record.present(), values)
            live = [u for u in used if u is not None and u.requires_grad]
            (through,) = gradients(live, live, problem.direct) if live else (nothing,)
            hyper = stepper.hyper(record).to_outer(problem.outer.tensors)
            found = [
                there or any(part is not None for part in where)
                for there, *where in zip(found, to_outer, through, hyper, strict=True)
            ]
        return found

    def _derivatives(
        self, record: StepRecord
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """What the step consumes, and a derivative that is there for each x it depends on."""
        problem, count = self.problem, len(self.problem.inner.tensors)
        if any(
            call.is_map for call, _ in record.calls
        ):  # there is no loss to differentiate
            parts = problem.inner_gradients(record.calls, create_graph=True)
            live = [g for g in parts if g is not None and g.requires_grad]
            return parts, gradients(live, live, problem.direct)[0]
        parts = problem.inner_gradients(record.calls, outer=True, once=True)
        return parts[:count], parts[count:]
