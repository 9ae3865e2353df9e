"""Forward mode: tangents of the iterate, carried along as the loop steps.

For directions e of the outer variables, with z = ẏ and ṡ the tangents of (y_k, s_k) along e,

    Ġ = H z + Jᵀ e = ∂_y (⟨∇_y g, z⟩ + ⟨∇_x g, e⟩)
    (z, ṡ) ← ∂Φ/∂(y, G, s, h) · (z, Ġ, ṡ, ∂h/∂x e)

Nothing of the loop is stored; a direction costs one product a step and one tangent iterate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..problem import BilevelProblem, WeightedCall, added, by_frozen, gradients
from .adjoint import (
    differentiable,
    leaf,
    mismatch,
    relative,
    step_norms,
    taken,
    total,
)
from .hyperparameters import HyperAdjoint
from .loop import Loop
from .pool import Pool
from .rule import UpdateRule
from .stepper import Stepper
from .trajectory import StepRecord
from .verification import refuse_unexplained, tolerance


class Tangents:
    """ẏ and ṡ along some directions of the outer variables, and the steps they were taken through.

    Args:
        problem: for the layouts.
        directions: (count, outer numel), in the outer vector's dtype.

    Attributes:
        values: (count, inner numel).
        states: per parameter, state key → (count, numel).
        reached: per outer tensor, whether any step depends on it.
        mismatch: how far each step's rule is from what the optimizer did.
        numbers: the numbers of those steps in the window.
        bounds: how far they may be, by what each was computed in.
        steps: how many inner steps they were taken through.
    """

    def __init__(self, problem: BilevelProblem, directions: Tensor):
        layout = problem.inner.layout
        self.directions = directions
        self.values = problem.to_initial(directions)
        self.states: list[dict[str, Tensor]] = [{} for _ in layout.sizes]
        self.reached = [tensor is None for tensor in problem.direct]
        self.mismatch: list[Tensor] = []
        self.numbers: list[int] = []
        self.bounds: list[float] = []
        self.steps = 0
        # of the last step: where it ended, how long it was, its number
        self._end: tuple[Sequence[Tensor], Tensor, int] | None = None

    def forget_mismatch(self) -> None:
        """The steps so far were checked, or belong to a window that is closed."""
        self.mismatch, self.numbers, self.bounds = [], [], []

    def state_dict(self) -> dict[str, Any]:
        """Everything, in plain types and tensors."""
        return {
            "directions": self.directions.clone(),
            "values": self.values.clone(),
            "states": [
                {key: rows.clone() for key, rows in state.items()}
                for state in self.states
            ],
            "reached": list(self.reached),
            "mismatch": [error.clone() for error in self.mismatch],
            "numbers": list(self.numbers),
            "bounds": list(self.bounds),
            "steps": self.steps,
        }

    @classmethod
    def from_state_dict(
        cls, problem: BilevelProblem, saved: dict[str, Any]
    ) -> Tangents:
        """The inverse of `state_dict`."""
        device = problem.inner.layout.device
        self = cls(problem, saved["directions"].to(problem.outer.layout.device))
        self.values = saved["values"].to(device, copy=True)
        self.states = [
            {key: rows.to(device, copy=True) for key, rows in state.items()}
            for state in saved["states"]
        ]
        self.reached, self.numbers = list(saved["reached"]), list(saved["numbers"])
        self.bounds = list(saved["bounds"])
        self.mismatch = [error.to(device) for error in saved["mismatch"]]
        self.steps = saved["steps"]
        return self

    def advance(
        self,
        problem: BilevelProblem,
        record: StepRecord,
        rules: Sequence[UpdateRule],
        loop: Loop,
    ) -> None:
        """Carry the tangents through a step the optimizer has just taken.

        Args:
            problem: the problem, its parameters after the step; frozen ones that an earlier step
                has moved are no constants (see `Variables.moving`).
            record: the step, with its iterate.
            rules: the update rule of each inner optimizer.
            loop: what was declared about the loop.

        Raises:
            OpaqueStep: the step evaluated its closure several times.
            ReplayMismatch: the state of an optimizer was written to before it.
        """
        refuse_unexplained([record], first=self._end is not None)
        stepper = Stepper(problem, rules, loop, Pool())
        point = stepper.start(record)
        found = self.errors(problem, record.calls, point.values)
        self.mismatch, self.numbers, self.bounds = found
        with problem.inner.swapped() as following:
            problem.inner.overwrite(point.values)
            raw, moved, reached = self._gradient_and_tangents(problem, record)
        hyper = stepper.hyper(record)
        used = loop.consumed(raw, record.present(), point.values)
        dots, transform_reached = _transformed(
            problem, record, point.values, raw, (moved, self.directions), loop
        )
        if loop.proximal is not None:  # λ (y − a) was added to the gradient
            drift = self.values - problem.to_initial(self.directions)
            rows = torch.split(drift, problem.inner.layout.sizes, dim=1)
            dots = [
                torch.add(dot, row, alpha=loop.proximal.weight)
                for dot, row in zip(dots, rows, strict=True)
            ]
        hyper_dots, hyper_reached = _hyper_tangents(problem, hyper, self.directions)
        norms = []
        pieces = torch.split(self.values, problem.inner.layout.sizes, dim=1)
        for index, (rule, options) in enumerate(stepper.updates(record, hyper)):
            gradient = used[index]
            if gradient is None:  # torch skipped it: nothing happened
                continue
            where = (point.values[index], gradient, point.states[index])
            tangent = (pieces[index], dots[index], self.states[index])
            value, self.states[index] = push_forward(
                rule, options, where, tangent, hyper.leaves, hyper_dots
            )
            norms.append(
                step_norms(value, following[index], point.values[index].to(value.dtype))
            )
        eps = max(torch.finfo(value.dtype).eps for value in point.values)
        if norms:
            self.mismatch.append(mismatch(norms, eps))
            self.numbers.append(record.index)
            self.bounds.append(tolerance(problem, record.calls))
            self._end = following, total(norms)[1], record.index
        self.steps += 1
        self.reached = [
            any(there)
            for there in zip(
                self.reached,
                reached,
                hyper_reached,
                transform_reached,
                strict=True,
            )
        ]

    def errors(
        self,
        problem: BilevelProblem,
        calls: Sequence[WeightedCall],
        values: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[int], list[float]]:
        """``mismatch``, ``numbers`` and ``bounds``, and how far y is from where it was left.

        Args:
            problem: the problem.
            calls: of the last step, or the next.
            values: the parameters now.
        """
        if self._end is None:
            return self.mismatch, self.numbers, self.bounds
        end, moved, number = self._end
        norms = [step_norms(v, e, e) for v, e in zip(values, end, strict=True)]
        off, _, size = total(norms)
        eps = max(torch.finfo(value.dtype).eps for value in values)
        error = relative(off, moved.to(off), size, eps)
        bound = tolerance(problem, calls)
        return [*self.mismatch, error], [*self.numbers, number], [*self.bounds, bound]

    def _gradient_and_tangents(
        self, problem: BilevelProblem, record: StepRecord
    ) -> tuple[list[Tensor | None], Tensor, list[bool]]:
        """G per parameter, Ġ with a row for each direction, and whether G depends on each x."""
        raw: list[Tensor | None] = []
        total = torch.zeros_like(self.values)
        reached = [False] * len(problem.direct)
        for frozen, calls in by_frozen(record.calls):
            at = problem.linearize(calls, outer=True)
            rows = [
                at.tangent(z, e)
                for z, e in zip(self.values, self.directions, strict=True)
            ]
            held = [id(tensor) in frozen for tensor in problem.inner.tensors]
            moved = torch.stack(rows)
            for there, part in zip(
                held, moved.split(problem.inner.layout.sizes, dim=1), strict=True
            ):
                if there:
                    part.zero_()
            total += moved
            raw = added(
                raw,
                [
                    None if there or g is None else g.detach()
                    for there, g in zip(held, at.parts, strict=True)
                ],
            )
            reached = [a or b for a, b in zip(reached, at.outer_reached, strict=True)]
        return raw, total, reached


def push_forward(
    rule: UpdateRule,
    hyper: Any,
    where: tuple[Tensor, Tensor, dict[str, Any]],
    tangent: tuple[Tensor, Tensor, dict[str, Tensor]],
    hyper_leaves: Sequence[Tensor],
    hyper_dots: Sequence[Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Jacobian-vector products of one parameter's rule, for all directions; ẏ in place.

    Args:
        rule: the update rule.
        hyper: the hyperparameters.
        where: parameter, gradient and state before the step.
        tangent: ẏ, Ġ and ṡ, a row for each direction; ẏ is overwritten.
        hyper_leaves: hyperparameters that depend on outer variables.
        hyper_dots: their tangents, an entry for each direction.

    Returns:
        The new value, and ṡ after the step.
    """
    (value, gradient, state), (z, g_dot, s_dot) = where, tangent
    dtype = z.dtype
    y, g = leaf(value, dtype), leaf(gradient, dtype)
    s = {k: leaf(v, dtype) if differentiable(k, v) else v for k, v in state.items()}
    with torch.enable_grad():
        new_value, new_state = taken(rule, y, g, s, hyper, s_dot)
    names = [key for key in s if differentiable(key, s[key])]
    dots = [z, g_dot, *hyper_dots]
    dots += [
        s_dot[k] if k in s_dot else z.new_zeros(len(z), state[k].numel()) for k in names
    ]
    kept = {k: v for k, v in new_state.items() if differentiable(k, v)}
    moved, *others = _jacobian_products(
        [new_value, *kept.values()],
        [y, g, *hyper_leaves, *(s[key] for key in names)],
        dots,
    )
    z.copy_(moved)
    return new_value.detach(), dict(zip(kept, others, strict=True))


def _jacobian_products(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], dots: Sequence[Tensor]
) -> list[Tensor]:
    """Jacobian-vector products for all directions, from reverse mode alone.

    A vector-Jacobian product is linear in its vector; differentiating it once more gives the
    Jacobian-vector product.

    Args:
        outputs: with the graph from the inputs; without a graph, their products are zero.
        inputs: leaves.
        dots: per input its tangents, a row for each direction.

    Returns:
        Per output, its tangents, a row for each direction.
    """
    rows = [dots[0].new_zeros(len(dots[0]), output.numel()) for output in outputs]
    live = [i for i, output in enumerate(outputs) if output.requires_grad]
    if not live:
        return rows
    with torch.enable_grad():
        probes = [torch.zeros_like(outputs[i], requires_grad=True) for i in live]
        found = torch.autograd.grad(
            [outputs[i] for i in live],
            inputs,
            probes,
            create_graph=True,
            allow_unused=True,
        )
    pairs = [
        (part, dot)
        for part, dot in zip(found, dots, strict=True)
        if part is not None and part.requires_grad
    ]
    for direction in range(len(dots[0]) if pairs else 0):
        moved = torch.autograd.grad(
            [part for part, _ in pairs],
            probes,
            [dot[direction].reshape(part.shape).to(part) for part, dot in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        for i, part in zip(live, moved, strict=True):
            if part is not None:
                rows[i][direction] = part.reshape(-1)
    return rows


def _transformed(
    problem: BilevelProblem,
    record: StepRecord,
    values: Sequence[Tensor],
    raw: Sequence[Tensor | None],
    dots: tuple[Tensor, Tensor],
    loop: Loop,
) -> tuple[list[Tensor], list[bool]]:
    """Tangents of the gradients, through the loop's transform.

    Args:
        problem: for the layouts.
        record: the step.
        values: the parameters before it.
        raw: the gradients.
        dots: tangents of gradients and of outer variables, a row for each direction.
        loop: has the transform.

    Returns:
        Per inner parameter, its rows; per outer tensor, whether the transform depends on it.
    """
    pieces = list(torch.split(dots[0], problem.inner.layout.sizes, dim=1))
    if not loop.transforms:
        return pieces, [False] * len(problem.direct)
    leaves = [None if g is None else leaf(g, dots[0].dtype) for g in raw]
    with torch.enable_grad():
        used = loop.transformed(leaves, record.present(), values)
    live = {i: u for i, u in enumerate(used) if u is not None and u.requires_grad}
    outputs = list(live.values())
    (there,) = gradients(outputs, outputs, problem.direct, retain_graph=True)
    rows = [*pieces, *torch.split(dots[1], problem.outer.layout.sizes, dim=1)]
    inputs = [
        (tensor, row)
        for tensor, row in zip([*leaves, *problem.direct], rows, strict=True)
        if tensor is not None and tensor.requires_grad
    ]
    found = _jacobian_products(
        outputs, [tensor for tensor, _ in inputs], [row for _, row in inputs]
    )
    result = [torch.zeros_like(piece) for piece in pieces]
    for i, row in zip(live, found, strict=True):
        result[i] = row
    return result, [part is not None for part in there]


def _hyper_tangents(
    problem: BilevelProblem, hyper: HyperAdjoint, directions: Tensor
) -> tuple[list[Tensor], list[bool]]:
    """∂h/∂x e for every hyperparameter that is differentiated, an entry for each direction."""
    tensors = problem.outer.tensors
    reached = [False] * len(tensors)
    dots = []
    for value in hyper.values:
        parts = torch.autograd.grad(
            value, tensors, retain_graph=True, allow_unused=True
        )
        reached = [a or p is not None for a, p in zip(reached, parts, strict=True)]
        dots.append(directions @ problem.outer.layout.flatten(parts))
    return dots, reached
