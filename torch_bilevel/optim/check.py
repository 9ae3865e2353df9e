"""Finite differences of the user's own recorded steps.

For a direction u of the outer variables, the recorded steps are run again by the user's own
optimizer at x ± ε u, and ⟨∇Φ, u⟩ is compared with [f(x + ε u, y₊) − f(x − ε u, y₋)]/(2 ε).
No update rule and no product of the library takes part in the difference.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import estimators
from ..errors import BilevelError
from ..inner import StepRecord, tolerance
from ..problem import WeightedCall, scalar
from .losses import outer_calls

if TYPE_CHECKING:
    from .bilevel import BilevelOptimizer

_EPSILON = {1e-10: 1e-5, 1e-5: 1e-3, 5e-2: 0.1}  # by verification tolerance, i.e. dtype
_STILL = {1e-10: 1e-12, 1e-5: 1e-7, 5e-2: 1e-3}


@dataclass
class HypergradientCheck:
    """The outcome of `check_hypergradient`.

    Attributes:
        relative_error: ‖estimated − finite_difference‖/‖finite_difference‖ over the directions.
        estimated: ⟨∇Φ, u⟩ per direction.
        finite_difference: the central difference per direction.
        estimator: the estimator that was checked.
        steps: inner steps each run took.
        settled: implicit estimators: whether the runs came to rest, which is where the implicit
            hypergradient is defined.
    """

    relative_error: float
    estimated: list[float]
    finite_difference: list[float]
    estimator: str
    steps: int
    settled: bool

    def __str__(self) -> str:
        pairs = ", ".join(
            f"{a:.6g} / {b:.6g}"
            for a, b in zip(self.estimated, self.finite_difference, strict=True)
        )
        rest = "" if self.settled else " (the inner loop had not come to rest)"
        return (
            f"{self.estimator}: relative error {self.relative_error:.2e} against finite "
            f"differences of {self.steps} inner steps{rest}; estimate / difference: {pairs}"
        )


def check_hypergradient(
    optimizer: BilevelOptimizer,
    *args: Any,
    loss: Any = None,
    estimator: Any = None,
    directions: int = 3,
    epsilon: float | None = None,
    max_steps: int = 2000,
    seed: int = 0,
    **kwargs: Any,
) -> HypergradientCheck:
    """Compare the hypergradient with finite differences of the recorded training steps.

    Unrolled estimators are compared with the recorded window, run once from where it began.
    Implicit estimators describe the point where the inner loop comes to rest: the recorded
    steps are run from the present parameters, over and over, until they no longer move or
    ``max_steps`` is reached. Everything is put back.

    Args:
        optimizer: with at least one recorded inner step since the last outer step.
        *args: a batch for the outer loss; drawn from its data if left out.
        loss: which outer loss, if several are registered.
        estimator: the estimator to check; the optimizer's own if None.
        directions: the first is the hypergradient itself, the others are random signs.
        epsilon: step in each entry of x; by the compute dtype if None (1e-5, 1e-3, 0.1 for
            float64, float32 and 16-bit).
        max_steps: cap on the inner steps of a run.
        seed: of the random directions.
        **kwargs: keyword arguments of the outer loss.

    Raises:
        BilevelError: the estimator keeps no steps (forward mode).

    Returns:
        Estimates, differences and their relative error; it prints as one line.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> y = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        >>> x = torch.ones(1, dtype=torch.float64, requires_grad=True)
        >>> o = tb.BilevelOptimizer(torch.optim.SGD([y], lr=0.3, momentum=0.9),
        ...     torch.optim.SGD([x], lr=0.1), estimator="unrolled")
        >>> train = o.inner_loss(lambda: ((y - x) ** 2).sum())
        >>> valid = o.outer_loss(lambda: ((y - 3) ** 2).sum())
        >>> for _ in range(5):
        ...     o.zero_grad(); train().backward(); _ = o.step()
        >>> tb.check_hypergradient(o).relative_error < 1e-8
        True
    """
    chosen = optimizer.estimator if estimator is None else estimators.parse(estimator)
    if chosen.follows:
        raise BilevelError(
            f"{chosen} follows the loop and keeps no steps that could be run again. Check "
            "'unrolled' on the same loop; the two agree to rounding (forward_gradient in the mean)."
        )
    calls, names = outer_calls(optimizer, args, kwargs, loss)
    parts = optimizer._estimate(calls, names, None, chosen)
    problem = optimizer.problem
    gradient = problem.outer.layout.flatten(parts)
    last = chosen.last(fresh=False) if chosen.unrolls else None
    steps = optimizer._recorder.window.steps(last)
    level = tolerance(problem, [call for step in steps for call in step.calls])
    replays = chosen.unrolls
    runner = Runner(optimizer, steps, calls, 1 if replays else max_steps, _STILL[level])
    epsilon = _EPSILON[level] if epsilon is None else epsilon
    generator = torch.Generator().manual_seed(seed)
    estimated, differences = [], []
    with runner.everything_restored():
        x = runner.outer_start()
        for index in range(directions):
            if index == 0:
                size = gradient.pow(2).mean().sqrt()
                u = gradient / size if bool(size > 0) else torch.ones_like(gradient)
            else:
                signs = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
                u = signs.to(x)
            ends = [runner.outer_value(x + s * epsilon * u) for s in (1, -1)]
            differences.append((ends[0] - ends[1]) / (2 * epsilon))
            estimated.append(float(torch.dot(gradient, u)))
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (estimated, differences))
    scale = max(float(torch.linalg.vector_norm(b)), 1e-300)
    return HypergradientCheck(
        relative_error=float(torch.linalg.vector_norm(a - b)) / scale
        if bool((a != b).any())
        else 0.0,
        estimated=estimated,
        finite_difference=differences,
        estimator=str(chosen),
        steps=runner.num_steps,
        settled=replays or runner.settled,
    )


class Runner:
    """Runs recorded steps again with the user's own optimizers.

    Args:
        optimizer: the bilevel optimizer.
        steps: the recorded steps.
        calls: the outer loss to evaluate at the end.
        max_steps: 1 runs the steps once from where they began; more repeats them from the
            present parameters.
        still: relative movement over one round below which a repeated run stops.
    """

    def __init__(
        self,
        optimizer: BilevelOptimizer,
        steps: Sequence[StepRecord],
        calls: Sequence[WeightedCall],
        max_steps: int,
        still: float,
    ):
        self.optimizer = optimizer
        self.problem = optimizer.problem
        self.loop = optimizer._recorder.loop
        self.steps = list(steps)
        self.calls = calls
        self.max_steps = max_steps
        self.still = still
        self.num_steps = 0
        self.settled = True
        # steps before the window, through which x is a constant
        self.before: list[StepRecord] = []
        first = self.steps[0]
        once = max_steps == 1
        if once and not first.has_iterate:  # under checkpoint_every and window
            records = list(optimizer._recorder.window)
            start = [record.index for record in records].index(first.index)
            while not first.has_iterate:
                start -= 1
                first = records[start]
                self.before.insert(0, first)
        self.start = (
            [v.clone() for v in first.values()]
            if once
            else [t.detach().clone() for t in self.problem.inner.tensors]
        )
        self.states = (
            first.states()
            if once
            else [o.state.get(p, {}) for o, p in _owned(optimizer.inners)]
        )

    def outer_start(self) -> Tensor:
        """x, flat; an initialisation has the value it had when the trajectory began."""
        if self.before:
            self.problem.inner.overwrite(self.start)
            self._put_states()
            for step in self.before:
                self._take(step)
            self.start = [t.detach().clone() for t in self.problem.inner.tensors]
            owned = _owned(self.optimizer.inners)
            self.states = [copy.deepcopy(dict(o.state[p])) for o, p in owned]
            self.before = []
        x = self.problem.outer.read()
        began = self.start if self.loop.proximal is None else self.loop.proximal.anchor
        values = self.problem.inner.layout.flatten(began)
        for here, there in self.problem.initial:
            x[there] = values[here].to(x)
        return x

    def _with_initial(self, values: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """Inner values with the initialisations of ``x`` in their places."""
        flat = self.problem.inner.layout.flatten(values).clone()
        for here, there in self.problem.initial:
            flat[here] = x[there].to(flat)
        return self.problem.inner.layout.split(flat)

    def outer_value(self, x: Tensor) -> float:
        """F after running the steps with the outer variables at ``x``."""
        self.problem.outer.overwrite(self.problem.outer.layout.split(x))
        once, near = self.max_steps == 1, self.loop.proximal
        self.problem.inner.overwrite(
            self._with_initial(self.start, x) if once else self.start
        )
        if near is not None:
            near = replace(near, anchor=self._with_initial(near.anchor, x))
            self.loop = replace(self.loop, proximal=near)
        self._put_states()
        self.num_steps = 0
        while True:
            before = self.problem.inner.read()
            for step in self.steps:
                self._take(step)
                self.num_steps += 1
            if self.max_steps == 1:
                break
            now = self.problem.inner.read()
            moved = torch.linalg.vector_norm(now - before)
            rest = bool(moved <= self.still * torch.linalg.vector_norm(now))
            if rest or self.num_steps >= self.max_steps:
                self.settled = self.settled and rest
                break
        total = 0.0
        for call, weight in self.calls:
            with self.problem.evaluating(call):
                value = scalar(self.problem.run(call), call.name).detach()
                total += float(value) * float(weight)
        return total

    def _put_states(self) -> None:
        """The state the run starts from, in the user's own optimizers."""
        owned = _owned(self.optimizer.inners)
        for (owner, parameter), state in zip(owned, self.states, strict=True):
            owner.state[parameter] = copy.deepcopy(dict(state))

    def _take(self, step: StepRecord) -> None:
        """One recorded step by the user's own optimizers, their hooks silenced."""
        gradients = self.problem.inner_gradients(step.calls)
        parts = [step.parts[i] for i in sorted(step.parts)]
        present = [there for part in parts for there in part.present]
        if not present:  # recorded without iterates
            present = [g is not None for g in gradients]
        used = self.loop.consumed(
            gradients, present, [t.detach() for t in self.problem.inner.tensors]
        )
        for tensor, gradient in zip(self.problem.inner.tensors, used, strict=True):
            tensor.grad = None if gradient is None else gradient.detach()
        for owner, part in zip(self.optimizer.inners, parts, strict=True):
            for group, hyper in zip(owner.param_groups, part.hyper, strict=False):
                group.update(hyper)
        hyperparameters = self.loop.hyperparameters
        if hyperparameters is not None:  # at the outer variables of this run
            hyperparameters.write(self.optimizer.inners, step.position)
        for owner in self.optimizer.inners:
            type(owner).step(owner)

    @contextlib.contextmanager
    def everything_restored(self) -> Iterator[None]:
        """Parameters, gradients, optimizer states, options and hooks come back at exit."""
        optimizers = self.optimizer.inners
        tensors = self.problem.inner.tensors
        gradients = [tensor.grad for tensor in tensors]
        saved = [
            (
                o,
                o.state,
                [dict(group) for group in o.param_groups],
                o._optimizer_step_pre_hooks,
                o._optimizer_step_post_hooks,
            )
            for o in optimizers
        ]
        # The user's optimizer writes in place; graphs the user holds must not notice.
        versions = torch.autograd._unsafe_preserve_version_counter(tuple(tensors))
        with versions, self.problem.inner.swapped(), self.problem.outer.swapped():
            try:
                for o in optimizers:
                    o.state = defaultdict(dict)
                    o._optimizer_step_pre_hooks = OrderedDict()
                    o._optimizer_step_post_hooks = OrderedDict()
                yield
            finally:
                for o, state, groups, pre, post in saved:
                    o.state = state
                    o._optimizer_step_pre_hooks = pre
                    o._optimizer_step_post_hooks = post
                    for group, before in zip(o.param_groups, groups, strict=True):
                        group.clear()
                        group.update(before)
                for tensor, gradient in zip(tensors, gradients, strict=True):
                    tensor.grad = gradient


def _owned(
    optimizers: Sequence[torch.optim.Optimizer],
) -> list[tuple[torch.optim.Optimizer, Any]]:
    return [(o, p) for o in optimizers for g in o.param_groups for p in g["params"]]
