"""Tasks: many short inner problems per outer step, each from where the last one began.

    task       inner loop from the shared start, outer loss back-propagated inside, all put back
    initialisation   a parameter that is in both optimizers; its hypergradient is that of its value
                     when the task began

MAML, ANIL, iMAML and their first-order relatives are choices of what is shared.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BilevelError, NoOuterStepWarning
from ..inner import fresh_state
from ..problem import BilevelProblem
from .report import Report

if TYPE_CHECKING:
    from ..estimators import Estimator
    from .bilevel import BilevelOptimizer
    from .constraining import Constraints
    from .recorder import Recorder


class TaskLoop:
    """The part of `BilevelOptimizer` that knows tasks."""

    outer: torch.optim.Optimizer
    inner_steps: int | None
    problem: BilevelProblem
    last_report: Report | None
    _recorder: Recorder
    _task: Task | None
    _tasks_done: int
    _remember_outer: Callable[[], None]
    _constraints: Constraints
    _estimator: Estimator

    def task(self, record: bool = True, share_buffers: bool = False) -> Task:
        """One task of a meta-learning loop: a context manager.

        At entry the inner optimizers start afresh (no state, no recorded steps, no adjoint, step
        0 of learned hyperparameters). Inside, take inner steps and back-propagate the outer
        loss, as often as you like. At exit, also by exception, parameters, inner optimizer
        state and options, buffers and inner gradients are as they were, and what the outer loss
        gave has been added to ``.grad`` of the outer variables. `outer_step` without arguments
        then steps along the mean over the tasks; ``outer.step()`` along the sum.

        Args:
            record: False adapts without recording (test time): the outer loss is an ordinary
                evaluation there, under ``torch.no_grad()`` or not back-propagated.
            share_buffers: keep what the task did to buffers (BatchNorm statistics) instead of
                putting them back.

        Returns:
            The context manager.

        Raises:
            BilevelError: a task is open already, or ``inner_steps`` takes outer steps.

        Example:
            >>> import torch, torch_bilevel as tb
            >>> w = torch.tensor([2.0], requires_grad=True)
            >>> optimizer = tb.BilevelOptimizer(torch.optim.SGD([w], lr=0.25),
            ...     torch.optim.SGD([w], lr=0.1), estimator="unrolled")
            >>> support = optimizer.inner_loss(lambda target: ((w - target) ** 2).sum())
            >>> query = optimizer.outer_loss(lambda target: ((w - target) ** 2).sum())
            >>> for target in (0.0, 1.0):
            ...     with optimizer.task():
            ...         support(target).backward(); _ = optimizer.step()
            ...         query(target).backward()
            >>> w.grad          # Σ (1 − 2 lr)² · 2 (w − target)
            tensor([1.5000])
        """
        if self.inner_steps and record:
            raise BilevelError(
                f"inner_steps={self.inner_steps} takes outer steps by itself, which cannot happen "
                "inside a task. Construct the optimizer without inner_steps, and call "
                "optimizer.outer_step() after the tasks."
            )
        return Task(self, record, share_buffers)  # type: ignore[arg-type]

    def _outer_leaves(self) -> list[Tensor]:
        """Where gradients of the outer variables go: initialisations to a stand-in of their own.

        Raises:
            BilevelError: there is an initialisation and no task.
        """
        if self._task is not None:
            return self._task.leaves
        if self.problem.initial:
            names = self.problem.outer.layout.names
            both = [
                name
                for name, direct in zip(names, self.problem.direct, strict=True)
                if direct is None
            ]
            raise BilevelError(
                f"{', '.join(both[:4])} {'is' if len(both) == 1 else 'are'} in both the inner and "
                "the outer optimizer: an initialisation, whose hypergradient is that of its value "
                "when a task began. Take the inner steps and back-propagate the outer loss inside "
                "`with optimizer.task():` (no task since the last outer step has), or leave the "
                "parameter out of one of the two optimizers."
            )
        return self.problem.outer.tensors

    def _forget_spent_tasks(self) -> None:
        """Start counting anew when the user dropped the gradients (``outer.zero_grad()``)."""
        if all(tensor.grad is None for tensor in self.problem.outer.tensors):
            self._tasks_done = 0

    def _before_outer_step(self, *_: Any) -> None:
        if self._task is not None:
            raise BilevelError(
                "An outer step inside a task: the task puts everything back at its end, the "
                "step included. Call optimizer.outer_step() after the `with optimizer.task():` "
                "block."
            )
        self._constraints.check(self.outer, self._estimator)
        self._remember_outer()

    def _step_over_tasks(self) -> Report:
        """Step along the mean over the tasks; the gradients are spent."""
        self._before_outer_step()
        tensors = self.problem.outer.tensors
        for tensor in tensors:
            if tensor.grad is not None:
                tensor.grad /= self._tasks_done
        self.outer.step()
        for tensor in tensors:
            tensor.grad = None
        return self.last_report  # type: ignore[return-value]


def require_initialisations(owner: BilevelOptimizer, features: bool) -> None:
    """Refuse parameters that the algorithm would not learn.

    Args:
        owner: the optimizer.
        features: whether there must be outer variables that are not adapted.

    Raises:
        BilevelError: an inner parameter is not in the outer optimizer, or all outer ones adapt.
    """
    problem, name = owner.problem, type(owner).__name__
    lost = len(problem.inner.tensors) - len(problem.initial)
    if lost:
        owner.remove()
        raise BilevelError(
            f"{name} learns the initialisation of every parameter that adapts, and {lost} of the "
            f"{len(problem.inner.tensors)} inner parameters are not in the outer optimizer. Pass "
            "them to both: inner=SGD(net.parameters(), lr=...), outer=Adam(net.parameters())."
        )
    if features and not problem.constants:
        owner.remove()
        raise BilevelError(
            f"{name} adapts the head only, and every outer parameter is also an inner one. Pass "
            "the head to the inner optimizer and the whole model to the outer one, or use MAML."
        )


class Task:
    """See `BilevelOptimizer.task`.

    Args:
        owner: the optimizer.
        record: whether inner steps are recorded.
        share_buffers: whether buffers stay as the task leaves them.

    Attributes:
        leaves: per outer variable, the tensor its gradient goes to inside the task.
    """

    def __init__(self, owner: BilevelOptimizer, record: bool, share_buffers: bool):
        self.owner = owner
        self.record = record
        self.share_buffers = share_buffers
        self.leaves: list[Tensor] = []
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Task:
        owner, problem = self.owner, self.owner.problem
        if owner._task is not None:
            raise BilevelError(
                "A task is open already; tasks cannot be nested. Leave the first `with "
                "optimizer.task():` block before the next begins."
            )
        owner._forget_spent_tasks()
        inner, outer = problem.inner.tensors, problem.outer.tensors
        self.leaves = [
            t.detach().clone().requires_grad_() if direct is None else t
            for t, direct in zip(outer, problem.direct, strict=True)
        ]
        owner._step_report = None
        # What is entered first is undone last.
        self._undo.enter_context(_attributes(owner, _task=self))
        self._outer_grads = [tensor.grad for tensor in outer]
        self._undo.callback(_set_gradients, outer, self._outer_grads)
        self._undo.callback(_set_gradients, inner, [t.grad for t in inner])
        _set_gradients([*inner, *outer], [None] * (len(inner) + len(outer)))
        values = [tensor.detach().clone() for tensor in inner]
        self._undo.callback(problem.inner.overwrite, values)
        self._undo.enter_context(_fresh_optimizers(owner.inners))
        if not self.share_buffers:
            for losses in (owner.inner_losses, owner.outer_losses):
                for loss in losses.values():
                    problem.modules.discover(loss.function, ())
            self._undo.enter_context(problem.modules.restored())
        recorder = owner._recorder
        recorder.thaw()
        self._undo.enter_context(
            _attributes(
                recorder,
                window=owner.estimator.new_window(owner.max_record_bytes),
                pending=[],
                current=None,
                position=0,
                loop=recorder.loop,
            )
        )
        recorder.begin(owner.proximal_term)
        owner._tasks_begun += 1
        recorder.window.number = owner._tasks_begun  # random directions of its own
        self._undo.enter_context(_attributes(owner, _memories={}, _found={}))
        if not self.record:
            self._undo.enter_context(recorder.pausing())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        owner = self.owner
        with self._undo:  # everything is put back, whatever happens here
            owner._recorder.thaw()
            steps = owner._recorder.window.count
            if kind is None and steps and self.record:
                self._without_outer_loss()
            found = [leaf.grad for leaf in self.leaves]
            report = owner._step_report
        if kind is not None:
            return
        if steps and report is None:
            owner._warn_once(
                NoOuterStepWarning,
                f"A task ended after {steps} recorded inner steps, and no registered outer loss "
                "was back-propagated inside it, so nothing is learned from it. Call "
                "query_loss(...).backward() of the function registered with "
                "@optimizer.outer_loss inside the task, or adapt with "
                "optimizer.task(record=False).",
            )
        outer = owner.problem.outer.tensors
        for tensor, before, part in zip(outer, self._outer_grads, found, strict=True):
            if part is not None:
                tensor.grad = part if before is None else before + part
        if self.record and any(part is not None for part in found):
            owner._tasks_done += 1
            owner._step_report = report

    def _without_outer_loss(self) -> None:
        """What a task gives by itself, if the estimator needs no outer loss and none was used."""
        owner = self.owner
        if owner.estimator.needs_outer_loss or owner._step_report is not None:
            return
        parts = owner._estimate([], ())
        for leaf, part in zip(self.leaves, parts, strict=True):
            leaf.grad = part


@contextlib.contextmanager
def _attributes(target: Any, **values: Any) -> Any:
    """Attributes with other values, put back at exit."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


@contextlib.contextmanager
def _fresh_optimizers(optimizers: list[torch.optim.Optimizer]) -> Any:
    """Inner optimizers without state; state and options are put back at exit."""
    saved = [(o, o.state, [dict(g) for g in o.param_groups]) for o in optimizers]
    try:
        for o in optimizers:
            o.state = defaultdict(dict, fresh_state(o))
        yield
    finally:
        for o, state, groups in saved:
            o.state = state
            for group, before in zip(o.param_groups, groups, strict=True):
                group.update(before)


def _set_gradients(tensors: list[Tensor], gradients: list[Tensor | None]) -> None:
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient
