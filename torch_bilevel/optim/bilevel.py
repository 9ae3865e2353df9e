"""`BilevelOptimizer`: the shell around the user's two optimizers.

This is the only place, with the recorder, that mutates anything: ``.grad`` of outer variables,
the window of recorded steps, the memory of estimators.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _checks, estimators
from ..errors import (
    BilevelError,
    LossNotRegistered,
    NoInnerStep,
    NoOuterStepWarning,
)
from ..estimators import Estimate, Estimator, EstimatorMemory, Situation
from ..inner import StepRecord, verify
from ..problem import BilevelProblem, WeightedCall, autocast
from ..second_order import uncompiled_method
from . import estimation
from .constraining import Constraints
from .control import Control
from .delegation import DelegatingOptimizer, unwrapped
from .hooks import take_over, weak
from .levels import build, check_levels, check_options, fits, known_modules
from .losses import outer_calls
from .recorder import Recorder
from .registry import LossRegistry
from .report import Report
from .sampling import Sampler
from .tasks import Task, TaskLoop

F = TypeVar("F", bound=Callable[..., Any])


class BilevelOptimizer(LossRegistry, TaskLoop, Control, DelegatingOptimizer):
    """Train ``inner`` as before and ``outer`` by the gradient of a validation loss.

        min_x f(x, y*(x)),    y*(x) = argmin_y g(x, y)

    ``step()`` is the inner step; hooks on ``inner`` see it, whoever calls it. After every
    ``inner_steps`` inner steps an outer step is taken on data of the registered outer loss;
    without ``inner_steps`` outer steps are written out, or taken by `outer_step`.

    Args:
        inner: the optimizer of the inner parameters y, or several that form one inner problem.
        outer: the optimizer of the outer variables x.
        modules: modules used in the losses; others are found at the first call.
        estimator: a name (``"cg"``, ``"unrolled(window=50)"``), an `Estimator`, or a solver.
        products: how implicit and stochastic estimators compute products with H and J: a name
            (``"double_backward"``, ``"traced(compile=True)"``, ...; see `products`) or an engine.
        inner_steps: take an outer step after so many inner steps; None never does by itself.
        warm_start: False puts the inner parameters, at the first inner loss after an outer step,
            back where they were at the first one of all, without optimizer state and adjoint;
            buffers and learning rates stay.
        proximal_term: λ of a term (λ/2)‖y − a‖² of the inner objective that is not part of the
            loss: its gradient is added to ``.grad`` just before each inner step. a is the inner
            parameters when the trajectory began (task, `restart`, construction); see `IMAML`.
        constraints: projections and proximal maps of outer tensors, applied right after every outer
            step, whoever takes it: one for all, a name (``"simplex"``) or a `Constraint`, or a
            list with one, or None, for each tensor of ``outer`` in order (tensors added later
            have none). A proximal map (`L1`, `Group`) adds its h to Φ; the outer loss that is
            reported is f without h.
        grad_scaler: the ``torch.amp.GradScaler`` of the loop, if it uses one.
        unused: what to do about outer variables that reach no loss: ``"error"`` or ``"zero"``.
        strict: raise on negative curvature instead of warning once.
        verify_every: verify the first step of a window again every so many outer steps; the
            first window is always verified.
        max_record_bytes: limit on what is recorded between outer steps; None takes half of
            the free memory at the first record.
        history: how many reports are kept.

    Raises:
        UnknownName: the estimator, a constraint or one of their options does not exist.
        UnsupportedParameter: a parameter is sparse, complex, expanded, not a leaf, ...
        NoUpdateRule: the estimator needs an update rule that ``inner`` has not.
        BilevelError: there are not as many constraints as outer tensors, or one is a proximal map
            and ``outer`` is not plain SGD; or ``warm_start=False`` with an initialisation.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> y = torch.zeros(1, requires_grad=True)
        >>> x = torch.ones(1, requires_grad=True)
        >>> optimizer = tb.BilevelOptimizer(
        ...     inner=torch.optim.SGD([y], lr=0.5), outer=torch.optim.SGD([x], lr=0.1))
        >>> @optimizer.inner_loss
        ... def train_loss():
        ...     return ((y - x) ** 2).sum()
        >>> @optimizer.outer_loss
        ... def valid_loss():
        ...     return ((y - 3) ** 2).sum()
        >>> train_loss().backward()
        >>> _ = optimizer.step()
        >>> valid_loss().backward()         # y*(x) = x = 1, so dΦ/dx = 2 (x - 3)
        >>> x.grad
        tensor([-4.])
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        outer: torch.optim.Optimizer,
        *,
        modules: nn.Module | Iterable[nn.Module] = (),
        estimator: Any = "cg",
        inner_steps: int | None = None,
        products: Any = "double_backward",
        warm_start: bool = True,
        proximal_term: float | None = None,
        constraints: Any = None,
        grad_scaler: Any = None,
        unused: str = "error",
        strict: bool = False,
        verify_every: int | None = None,
        max_record_bytes: int | None = None,
        history: int = 1000,
    ):
        super().__init__(inner)
        self.outer = outer = unwrapped(outer)
        check_levels(self.inners, outer)
        check_options(
            unused,
            inner_steps=inner_steps,
            verify_every=verify_every,
            max_record_bytes=max_record_bytes,
        )
        self.inner_steps = inner_steps
        self.warm_start = warm_start
        if proximal_term is not None:
            _checks.real(
                "BilevelOptimizer", "proximal_term", proximal_term, positive=True
            )
        self.proximal_term = proximal_term
        self.unused = unused
        self.strict = strict
        self.verify_every = verify_every
        self.max_record_bytes = max_record_bytes
        self.last_report: Report | None = None
        self._step_report: Report | None = None  # of the coming outer step
        self.history: deque[Report] = deque(maxlen=history)
        self.outer_steps = 0
        self.inner_losses = {}
        self.outer_losses = {}
        self._modules = known_modules(modules)
        self.products = products
        self._estimator = estimators.parse(estimator)
        self._estimator.check(self.inners)
        self._estimator.check_outer(outer)
        self._memories: dict[tuple[str, ...], EstimatorMemory] = {}
        self._found: dict[tuple[str, ...], Estimate] = {}  # for the coming outer step
        self._warned: set[type[Warning]] = set()
        self._outer_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._problem: BilevelProblem | None = None
        names = self.problem.outer.layout.names
        self._constraints = Constraints(constraints, outer, self._estimator, names)
        self._recorder = Recorder(
            self.inners,
            partial(attrgetter("problem"), self),
            self._estimator.new_window(max_record_bytes),
            grad_scaler,
            self._after_inner_step,
            self._before_inner_step,
        )
        self._recorder.directs = self._estimator.directs
        self._sampler = Sampler(self)
        self._recorder.watch_outer(self.problem.constants)
        self._recorder.begin(proximal_term)
        self._await_trajectory()
        self._task: Task | None = None
        self._tasks_done = 0  # since the last outer step
        self._tasks_begun = 0  # ever
        take_over(self)
        before, after = weak(self._before_outer_step), weak(self._after_outer_step)
        self._recorder._handles += [
            outer.register_step_pre_hook(before),
            outer.register_step_post_hook(after),
        ]

    # --- steps ------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the inner parameters; outer ones are ``outer``'s business."""
        if self._reset_gradients(set_to_none):
            self._recorder.pending = []

    def outer_step(self, *args: Any, **kwargs: Any) -> Report:
        """Take an outer step: hypergradient, then ``outer.step()``.

        After tasks, and without arguments, the hypergradient is the mean over the tasks since
        the last outer step of what was back-propagated inside them.

        Args:
            *args: a batch for the only outer loss; without any, batches are drawn from the
                outer losses' data.
            **kwargs: keyword arguments of the outer loss.

        Returns:
            The report, which prints as one line.
        """
        if not (args or kwargs):
            self._forget_spent_tasks()
            if self._tasks_done:
                return self._step_over_tasks()
            self._outer_leaves()
        self._before_outer_step()
        self.hypergradient(*args, **kwargs)
        self.outer.step()
        assert self.last_report is not None
        return self.last_report

    @uncompiled_method
    def hypergradient(
        self,
        *args: Any,
        loss: Any = None,
        estimator: Any = None,
        write: bool = True,
        accumulate: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """The hypergradient at the present parameters, without stepping.

        Args:
            *args: a batch for the outer loss; without any, batches are drawn from the data.
            loss: which outer loss to use, if several are registered.
            estimator: another estimator, for a second opinion at the same point.
            write: put it into ``.grad`` of the outer variables, overwriting.
            accumulate: add to ``.grad`` instead.
            **kwargs: keyword arguments of the outer loss.

        Returns:
            One tensor per outer variable.
        """
        chosen = None if estimator is None else estimators.parse(estimator)
        calls, names = outer_calls(self, args, kwargs, loss)
        parts = self._estimate(calls, names, None, chosen)
        if write:
            for tensor, part in zip(self._outer_leaves(), parts, strict=True):
                if accumulate and tensor.grad is not None:
                    tensor.grad = tensor.grad + part
                else:
                    tensor.grad = part.clone()
        return tuple(parts)

    def _estimate(
        self,
        calls: Sequence[WeightedCall],
        names: tuple[str, ...],
        values: Sequence[Tensor] | None = None,
        estimator: Estimator | None = None,
    ) -> list[Tensor]:
        """One hypergradient; keeps its report and, for the warm start, its adjoint."""
        self._recorder.thaw()
        self._outer_leaves()  # an initialisation needs a task
        if self._task is not None and not self._task.record:
            raise NoInnerStep(
                "The outer loss was to be differentiated inside optimizer.task(record=False), "
                "which records nothing. Evaluate it under torch.no_grad() there, or leave "
                "record=False out."
            )
        if not self.inner_losses:
            raise LossNotRegistered(
                "No inner loss is registered. Decorate the training loss with "
                "@optimizer.inner_loss."
            )
        own = estimator is None
        memory = EstimatorMemory()
        if own:
            memory = self._memories.setdefault(names, memory)
        situation = self._situation(memory.copy())
        chosen = estimator or self._estimator
        chosen.check(self.inners)
        left = self._recorder.leftover
        estimation.check_window(situation, chosen, self.outer_steps, left)
        # The caller may be inside an autocast region of its own.
        with autocast(self.problem.no_autocast):
            if self._recorder.to_verify is not None:
                verify(
                    self.problem,
                    self._recorder.to_verify,
                    self._recorder.loop,
                )
                self._recorder.to_verify = None
            parts, report, estimate = estimation.run(
                situation,
                chosen,
                calls,
                values,
                unused=self.unused,
                strict=self.strict,
                warn=self._warn_once,
            )
        self.last_report = report
        if own:
            self._step_report = report
            self._found[names] = estimate
        return parts

    def _situation(self, memory: EstimatorMemory) -> Situation:
        recorder = self._recorder
        return Situation(
            self.problem,
            recorder.window,
            self.inners,
            recorder.loop,
            memory,
            self._sampler,
            products=self._products,
        )

    def _before_inner_step(self, step: StepRecord) -> None:
        """Let the estimator replace the gradients that are about to be consumed."""
        if self._recorder.grad_scaler is not None:
            raise BilevelError(
                f"{self._estimator} replaces gradients before the inner step, and a GradScaler "
                "scales them. Use bfloat16 autocast, which needs no scaler."
            )
        memory = self._memories.setdefault((), EstimatorMemory())
        with autocast(self.problem.no_autocast):
            self._estimator.direct(self._situation(memory), step)

    def _after_inner_step(self) -> None:
        if self._estimator.follows:
            situation = self._situation(EstimatorMemory())
            problem, window = situation.problem, situation.window
            moving = self._estimator.differentiating(problem, window)
            with autocast(problem.no_autocast), moving:
                self._estimator.follow(situation)
        count = self._recorder.window.count
        if self.inner_steps and count >= self.inner_steps:
            self.outer_step()
        elif count == 1000 and any(loss.data for loss in self.outer_losses.values()):
            self._warn_once(
                NoOuterStepWarning,
                "1,000 inner steps were recorded without an outer step, although an outer loss "
                f"has data (inner_steps={self.inner_steps}). Pass inner_steps= to take outer "
                "steps automatically, or call optimizer.outer_step().",
            )

    def _after_outer_step(self, *_: Any) -> None:
        """Close the window: adjoints become warm starts, records are dropped."""
        for names, found in self._found.items():
            self._memories.setdefault(names, EstimatorMemory()).keep(found)
        self._found.clear()
        self._constraints.apply(self.outer)
        self._extrapolate()
        dropped = self._recorder.window.count
        self._recorder.window.clear(restart=not self.warm_start)
        self._await_trajectory()
        self.outer_steps += 1
        self._tasks_done = 0
        if self.verify_every and self.outer_steps % self.verify_every == 0:
            self._recorder.verify_next = True
        report, self._step_report = self._step_report, None
        if report is None:
            self._warn_dropped(
                "outer.step() was called without a hypergradient", dropped
            )
        if report is not None:
            report.outer_step = self.outer_steps
            self.last_report = report
            self.history.append(report.archived())
            for hook in list(self._outer_hooks.values()):
                hook(self, report)

    # --- levels -----------------------------------------------------------------------

    @property
    def problem(self) -> BilevelProblem:
        """Both levels at the live parameters; rebuilt when parameter groups change."""
        known = self._problem
        if known is None or not fits(known, self.inners, self.outer):
            return self._rebuild()
        return known

    def _rebuild(self) -> BilevelProblem:
        """Follow the optimizers' parameter groups; what was recorded of others is dropped."""
        again = self._problem is not None
        self._problem = build(self.inners, self.outer, self._modules)
        if again:
            self._warn_dropped("Parameter groups changed", self._recorder.window.count)
            self._recorder.restart()
            self._recorder.present = self._problem
            self._recorder.begin(self.proximal_term)
            self._recorder.watch_outer(self._problem.constants)
            self._start = None
            self._await_trajectory()
            self._forget_adjoints()
        return self._problem

    def __repr__(self) -> str:
        inner = ", ".join(type(optimizer).__name__ for optimizer in self.inners)
        return (
            f"{type(self).__name__}(inner={inner}, outer={type(self.outer).__name__}, "
            f"estimator={str(self._estimator)!r}, inner_steps={self.inner_steps})"
        )
