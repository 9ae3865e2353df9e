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

from ..errors import OpaqueStep
from ..problem import BilevelProblem
from .adjoint import differentiable, leaf, mismatch, step_norms
from .hyperparameters import HyperAdjoint
from .loop import Loop
from .pool import Pool
from .replay import Stepper
from .rule import UpdateRule
from .trajectory import StepRecord
from .verification import consumed


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
        self.steps = 0

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
            problem: the problem, its parameters after the step.
            record: the step, with its iterate.
            rules: the update rule of each inner optimizer.
            loop: what was declared about the loop.

        Raises:
            OpaqueStep: the step evaluated its closure several times.
        """
        if record.opaque:
            raise OpaqueStep(
                f"Inner step {record.index} evaluated its closure several times, so it is not one "
                "application of an update rule and has no tangent. Use an implicit estimator "
                "such as 'cg', which uses the last evaluation."
            )
        stepper = Stepper(problem, rules, loop, Pool())
        point = stepper.forward([record])[0]
        with problem.inner.swapped() as following:
            problem.inner.overwrite(point.values)
            at = problem.linearize(record.calls, outer=True)
            moved = [
                at.tangent(z, e)
                for z, e in zip(self.values, self.directions, strict=True)
            ]
        gradients = torch.stack(moved)  # Ġ, a row for each direction
        hyper = stepper.hyper(record)
        raw = [None if g is None else g.detach() for g in at.parts]
        used, dots = _transformed(problem, record, point.values, raw, gradients, loop)
        if loop.proximal is not None:  # λ (y − a) was added to the gradient
            drift = self.values - problem.to_initial(self.directions)
            rows = torch.split(drift, problem.inner.layout.sizes, dim=1)
            dots = [
                torch.add(dot, row, alpha=loop.proximal.weight)
                for dot, row in zip(dots, rows, strict=True)
            ]
            used = loop.consumed(raw, record.present(), point.values)
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
        self.steps += 1
        self.reached = [
            a or b or c
            for a, b, c in zip(
                self.reached, at.outer_reached, hyper_reached, strict=True
            )
        ]


def push_forward(
    rule: UpdateRule,
    hyper: Any,
    where: tuple[Tensor, Tensor, dict[str, Any]],
    tangent: tuple[Tensor, Tensor, dict[str, Tensor]],
    hyper_leaves: Sequence[Tensor],
    hyper_dots: Sequence[Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Jacobian-vector products of one parameter's rule, for all directions; ẏ in place.

    A vector-Jacobian product is linear in its vector; differentiating it once more gives the
    Jacobian-vector product from reverse mode alone.

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
        new_value, new_state = rule.step(y, g, s, hyper)
        outputs = {"": new_value}
        outputs |= {k: v for k, v in new_state.items() if differentiable(k, v)}
        live = {k: v for k, v in outputs.items() if v.requires_grad}
        probes = [torch.zeros_like(v, requires_grad=True) for v in live.values()]
        names = [key for key in s if differentiable(key, s[key])]
        found = torch.autograd.grad(
            list(live.values()),
            [y, g, *hyper_leaves, *(s[key] for key in names)],
            probes,
            create_graph=True,
            allow_unused=True,
        )
    dots = [z, g_dot, *hyper_dots]
    dots += [
        s_dot[k] if k in s_dot else z.new_zeros(len(z), state[k].numel()) for k in names
    ]
    pairs = [
        (part, dot)
        for part, dot in zip(found, dots, strict=True)
        if part is not None and part.requires_grad
    ]
    rows = {k: z.new_zeros(len(z), v.numel()) for k, v in outputs.items()}
    for i in range(len(z)):
        if not pairs:
            break
        moved = torch.autograd.grad(
            [part for part, _ in pairs],
            probes,
            [dot[i].reshape(part.shape).to(part) for part, dot in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        for key, part in zip(live, moved, strict=True):
            if part is not None:
                rows[key][i] = part.reshape(-1)
    z.copy_(rows.pop(""))
    return new_value.detach(), rows


def _transformed(
    problem: BilevelProblem,
    record: StepRecord,
    values: Sequence[Tensor],
    raw: Sequence[Tensor | None],
    dots: Tensor,
    loop: Loop,
) -> tuple[list[Tensor | None], list[Tensor]]:
    """The gradients the step consumed and their tangents, through the loop's transform."""
    dtype = problem.inner.layout.dtype
    pieces = list(torch.split(dots, problem.inner.layout.sizes, dim=1))
    if loop.transform is None:
        return consumed(raw, record.present(), values, None), pieces
    leaves = [None if g is None else leaf(g, dtype) for g in raw]
    with torch.enable_grad():
        used = consumed(leaves, record.present(), values, loop.transform)
        live = [i for i, u in enumerate(used) if u is not None and u.requires_grad]
        probes = [torch.zeros_like(used[i], requires_grad=True) for i in live]  # type: ignore
        inputs = [i for i, g in enumerate(leaves) if g is not None]
        found = torch.autograd.grad(
            [used[i] for i in live],  # type: ignore[misc]
            [leaves[i] for i in inputs],  # type: ignore[misc]
            probes,
            create_graph=True,
            allow_unused=True,
        )
    pairs = [
        (part, i) for part, i in zip(found, inputs, strict=True) if part is not None
    ]
    result = [torch.zeros_like(piece) for piece in pieces]
    for row in range(len(dots)):
        moved = torch.autograd.grad(
            [part for part, _ in pairs],
            probes,
            [pieces[i][row].reshape(part.shape) for part, i in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        for i, part in zip(live, moved, strict=True):
            if part is not None:
                result[i][row] = part.reshape(-1)
    return [None if u is None else u.detach() for u in used], result


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
