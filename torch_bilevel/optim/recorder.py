"""Hooks that see the user's inner loop: losses, backwards and steps.

    call        a registered loss was evaluated; remembered until it is back-propagated
    pending     calls back-propagated since the inner gradients were last empty
    step        what one `step()` consumed: the pending calls, and the iterate if needed

The hook on the returned loss tells the weight it is back-propagated with, so a call that is
never back-propagated does not count and ``(loss / 4).backward()`` four times is accumulation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..errors import BilevelError
from ..inner import Loop, Part, Proximal, StepRecord, Window
from ..inner.pool import Pool
from ..inner.trajectory import take_part
from ..problem import (
    BilevelProblem,
    Call,
    WeightedCall,
    evaluations,
    keep,
    record,
    scalar,
)
from ..second_order import uncompiled
from .hooks import AfterBackward, number, on_gradient, outside_loss, stand_last, weak

_grad = attrgetter("grad")
_NOTHING = Part(hyper=[], groups=[], present=[])


class Recorder:
    """Watches the inner optimizers and the registered inner losses.

    Args:
        optimizers: the inner optimizers.
        problem: gives the problem at present (parameter groups may be added).
        window: where finished steps go.
        grad_scaler: the scaler the loop uses, or None.
        on_step: called after every complete inner step.
        direct: called before an inner step to replace gradients, if the estimator ``directs``.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        problem: Callable[[], BilevelProblem],
        window: Window,
        grad_scaler: Any,
        on_step: Callable[[], None],
        direct: Callable[[StepRecord], None],
    ):
        self.optimizers = list(optimizers)
        self.problem = problem
        self.present = problem()  # refreshed at every call of a registered loss
        self.window = window
        self.grad_scaler = grad_scaler
        self.on_step = on_step
        self.direct = direct
        self.directs = False
        self.apply_map: Callable[[], None] | None = None  # when nothing is pending
        self.beginning: Callable[[], None] | None = None  # before the first call
        self.pending: list[WeightedCall] = []
        self.current: StepRecord | None = None
        self.paused = 0
        self.loop = Loop()  # what the user declared about the loop
        self.epoch = 0  # complete inner steps ever
        self.position = 0  # complete inner steps since the trajectory began
        self.verify_next = True
        self.to_verify: StepRecord | None = None
        self.inside = False  # a registered inner loss is being evaluated for the user
        self.frozen: list[Tensor] = []  # outer variables that are constants at present
        self._task = self._outer_task = -1
        self._first = 0
        self._marks: list[tuple[int, int]] | None = None
        self._twin: StepRecord | None = None  # what is verified of the current step
        self._outer_grads: list[Tensor | None] = []
        self._grad_version: tuple[int, int] | None = None
        self._handles: list[Any] = []
        self.removed = False
        self.leftover = False
        self._watched: set[int] = set()
        self._uncompiled_backward = uncompiled(self._on_backward)
        pre, post = weak(self._before_step), weak(self._after_step)
        self._before = [o.register_step_pre_hook(pre) for o in self.optimizers]
        after = [o.register_step_post_hook(post) for o in self.optimizers]
        self._handles += [*self._before, *after]

    def watch_outer(self, tensors: Sequence[Tensor]) -> None:
        """Notice gradients that reach outer variables outside the registered losses."""
        for tensor in tensors:
            if id(tensor) not in self._watched and tensor.requires_grad:
                self._watched.add(id(tensor))
                hook = weak(self._on_outer_grad)
                handle = tensor.register_post_accumulate_grad_hook(hook)
                self._handles.append(handle)

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.removed = True
        self.restart()
        self.thaw()

    # --- losses -----------------------------------------------------------------------

    def call(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Evaluate a registered inner loss for the user, unchanged, and remember it."""
        if self.inside or self.removed or evaluations:
            return function(*args, **kwargs)
        if self.frozen:
            self.thaw()
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        stand_last(self._before)
        if self.beginning is not None and not self.paused:
            self.beginning()
        problem, window = self.problem(), self.window
        self.present, remembered = problem, None
        if not self.paused:
            self._outer_grads = list(map(_grad, problem.outer.tensors))
            if function not in problem.modules.searched:
                problem.modules.discover(function, (args, kwargs))
            keep_buffers = window.iterates or self.verify_next
            remembered = record(function, args, kwargs, problem, keep_buffers)
        self.inside = True
        try:
            if remembered is not None and window.keep_graph:
                result = keep(problem, remembered, args, kwargs)
            else:
                self._freeze()
                result = function(*args, **kwargs)
        finally:
            self.inside = False
            while self.frozen:  # thaw(), without its frame
                self.frozen.pop().requires_grad = True
        if remembered is not None:
            loss = scalar(result, remembered.name)
            if loss.requires_grad:
                on_gradient(loss, partial(self._on_backward, remembered))
        return result

    def _freeze(self) -> None:
        """Outer variables are constants in the user's own inner call and its backward."""
        for tensor in self.present.constants:
            if tensor.requires_grad:
                tensor.requires_grad = False
                self.frozen.append(tensor)

    def thaw(self) -> None:
        """Make outer variables variables again."""
        while self.frozen:
            self.frozen.pop().requires_grad = True

    def _on_backward(self, call: Call, weight: Tensor) -> None:
        if torch.compiler.is_compiling():
            return self._uncompiled_backward(call, weight)
        task = torch._C._current_graph_task_id()
        if task == self._outer_task:
            self._outside(call.name)
        if task != self._task:  # the first registered loss of this backward
            self._task = task
            if self.pending and self._gradients_are_empty():
                self.pending = []
            if not self.pending and self.epoch == 1 and not self._gradients_are_empty():
                self.leftover = True  # from the step before: no zero_grad()
            self._first = len(self.pending)
            self._marks = self._gradient_marks()
            if call.kept is None:  # activation checkpointing runs the forward again
                self._freeze()
            done = AfterBackward(self)
            torch.autograd.Variable._execution_engine.queue_callback(done)  # type: ignore[attr-defined]
        # hooks.number(), without its frame
        value = weight.item() if weight.is_cpu else weight.detach()
        self.pending.append((call, value))

    def after_backward(self) -> None:
        """Keep the calls of a backward that reached ``.grad`` of an inner parameter.

        ``torch.autograd.grad(train_loss(...), ...)`` runs the hooks but steps consume nothing
        of it.
        """
        # thaw() and _version(), without their frames: this runs once an inner step
        while self.frozen:
            self.frozen.pop().requires_grad = True
        version = None
        for gradient in map(_grad, self.present.inner.tensors):
            if gradient is not None:
                version = id(gradient), gradient._version
                break
        before = self._marks
        if (version if before is None else self._gradient_marks()) == before:
            del self.pending[self._first :]
        self._grad_version = version

    def _gradient_marks(self) -> list[tuple[int, int]] | None:
        """Identity and version of every gradient; None where there is none at all."""
        marks = []
        for gradient in map(_grad, self.present.inner.tensors):
            if gradient is not None:
                marks.append((id(gradient), gradient._version))
        return marks or None

    def _on_outer_grad(self, tensor: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        self._outer_task = task
        if task == self._task:
            # While frozen it was not accumulated; only the hook ran.
            self._outside(self.pending[-1][0].name, tensor)

    def _outside(self, name: str, seen: Tensor | None = None) -> None:
        outer = self.present.outer
        touched = []
        for tensor, before, label in zip(
            outer.tensors, self._outer_grads, outer.layout.names, strict=True
        ):
            if tensor is seen or tensor.grad is not before:
                touched.append(label)
                tensor.grad = before
        raise outside_loss(touched, name)

    # --- steps ------------------------------------------------------------------------

    def _version(self) -> tuple[int, int] | None:
        """Identity and version of the first gradient; ``zero_()`` moves it."""
        for gradient in map(_grad, self.present.inner.tensors):
            if gradient is not None:
                return id(gradient), gradient._version
        return None

    def _gradients_are_empty(self) -> bool:
        """Every inner ``.grad`` is None, or was set to zero since the last backward."""
        version = self._version()
        if version is None:
            return True
        if version == self._grad_version:
            return False
        tensors = self.present.inner.tensors
        return not any(p.grad is not None and bool(p.grad.any()) for p in tensors)

    def _before_step(
        self,
        optimizer: torch.optim.Optimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple, dict] | None:
        if self.frozen:
            self.thaw()
        if self.paused:
            return None
        if self.apply_map is not None and not self.pending:
            self.apply_map()
        if self.loop.hyperparameters is not None:
            self.loop.hyperparameters.write(self.optimizers, self.position)
        index = self.optimizers.index(optimizer)
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            self._capture(index, optimizer)
            return None
        runs = 0

        def watched() -> Any:
            nonlocal runs
            result = closure()
            self._capture(index, optimizer, again=runs > 0)
            runs += 1
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        owner, _, *others = args  # type: ignore[misc]
        return (owner, watched, *others), kwargs

    def _capture(
        self, index: int, optimizer: torch.optim.Optimizer, again: bool = False
    ) -> None:
        """Turn the pending calls into this step's record, just before the update."""
        found_inf = getattr(optimizer, "found_inf", None)  # fused, under a GradScaler
        if found_inf is not None and bool(found_inf):
            self.pending = []
            return
        fused_scale = getattr(optimizer, "grad_scale", None)
        calls, self.pending = self.pending, []
        if fused_scale is not None or self.grad_scaler is not None:
            calls = self._unscaled(calls, fused_scale)
        # Implicit estimators evaluate at the present point, buffers included.
        window = self.window
        whole = calls
        if self.verify_next and not window.iterates:
            calls = [(replace(call, buffers=None), weight) for call, weight in calls]
        if len(self.optimizers) == 1 and self.current is not None and not again:
            self.current = self._twin = None  # that step raised and never finished
        if self.current is None:
            if not calls and all(p.grad is None for p in self.present.inner.tensors):
                return  # a step without any gradient changes nothing
            self.current = StepRecord(calls, window.count, self.position)
            if self.verify_next:
                self._twin = StepRecord(whole, window.count)
        elif again:
            self.current.calls, self.current.opaque = calls, True
            self._twin = None
            return
        elif index in self.current.parts:
            raise BilevelError(
                f"Inner optimizer {index} ({type(optimizer).__name__}) stepped twice while "
                "another inner optimizer has not stepped. With inner=[a, b] one inner step is "
                "one step of each; call optimizer.step(), which steps all of them."
            )
        elif calls:
            self.current.calls = self.current.calls + calls
            if self._twin is not None:
                self._twin.calls = self._twin.calls + whole
        self.current.parts[index] = _NOTHING
        if window.iterates:
            pool = window.pool if window.wants_iterate() else None
            self.current.parts[index] = take_part(optimizer, pool)
            self.current.rewritten |= window.versions.changed(index, optimizer.state)
        if self.loop.rates is not None:
            self.loop.rates.scale(optimizer, self.present.inner.tensors)
        if self._twin is not None:
            self._twin.parts[index] = take_part(
                optimizer, Pool(), gradients=True, scale=fused_scale
            )
        if self.directs:
            self.direct(self.current)
        if self.loop.proximal is not None:
            tensors = self.present.inner.tensors
            self.loop.proximal.pull(optimizer, tensors, fused_scale)

    def begin(self, proximal_term: float | None) -> None:
        """A trajectory begins at the present parameters."""
        self.position = 0
        if proximal_term is not None:
            anchor = [t.detach().clone() for t in self.problem().inner.tensors]
            self.loop = replace(self.loop, proximal=Proximal(proximal_term, anchor))

    def _unscaled(
        self, calls: list[WeightedCall], scale: Tensor | None
    ) -> list[WeightedCall]:
        """The calls with their weights divided by the scale of the loop's scaler."""
        if scale is None and calls:
            one = torch.ones((), device=self.present.inner.layout.device)
            scale = self.grad_scaler.scale(one)
        if scale is None:
            return calls
        return [(call, number(weight / scale)) for call, weight in calls]

    def _after_step(
        self,
        optimizer: torch.optim.Optimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if self.paused:
            return
        self.window.versions.leave(self.optimizers.index(optimizer), optimizer.state)
        if self.current and len(self.current.parts) == len(self.optimizers):
            finished, self.current = self.current, None
            if self._twin is not None:
                self.to_verify, self._twin = self._twin, None
                self.verify_next = self.epoch == 0  # zeros may hide a penalty
            self.epoch += 1
            self.position += 1
            self.window.append(finished)
            self.on_step()

    def restart(self) -> None:
        """Forget pending calls and recorded steps; what was not verified is anew."""
        self.pending, self.current, self._twin, self.leftover = [], None, None, False
        if self.to_verify is not None:
            self.to_verify, self.verify_next = None, True
        self.window.clear(restart=True)

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Neither record nor count inside."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1
