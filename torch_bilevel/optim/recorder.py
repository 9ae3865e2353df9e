"""Hooks that see the user's inner loop: losses, backwards and steps.

    call        a registered loss was evaluated; remembered until it is back-propagated
    pending     calls back-propagated since the inner gradients were last empty
    step        what one `step()` consumed: the pending calls, and the iterate if needed

The hook on the returned loss tells the weight it is back-propagated with, so a call that is
never back-propagated does not count and ``(loss / 4).backward()`` four times is accumulation.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from ..errors import BilevelError, OuterOutsideLoss
from ..inner import Part, StepRecord, Window
from ..inner.trajectory import Pool, take_part
from ..problem import BilevelProblem, Call, WeightedCall, record, scalar
from ..second_order import uncompiled


def _on_gradient(loss: Tensor, hook: Callable[[Tensor], None]) -> None:
    """``loss.register_hook(hook)`` without a handle to remove it by, for 15 µs less."""
    if loss.grad_fn is None or loss._backward_hooks is not None:
        loss.register_hook(hook)
        return
    loss._backward_hooks = OrderedDict({0: hook})
    loss.grad_fn._register_hook_dict(loss)  # type: ignore[attr-defined]


def _number(weight: Tensor) -> Tensor | float:
    """A weight to keep: a number where reading it costs nothing.

    On the CPU a tensor of 4 bytes that outlives the step pins a hole in the heap.
    """
    return weight.item() if weight.device.type == "cpu" else weight.detach()


_NOTHING = Part(hyper=[], groups=[], present=[])


class Recorder:
    """Watches the inner optimizers and the registered inner losses.

    Args:
        optimizers: the inner optimizers.
        problem: gives the problem at present (parameter groups may be added).
        window: where finished steps go.
        grad_scaler: the scaler the loop uses, or None.
        on_step: called after every complete inner step.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        problem: Callable[[], BilevelProblem],
        window: Window,
        grad_scaler: Any,
        on_step: Callable[[], None],
    ):
        self.optimizers = list(optimizers)
        self.problem = problem
        self.present = problem()  # refreshed at every step and hypergradient
        self.window = window
        self.grad_scaler = grad_scaler
        self.on_step = on_step
        self.pending: list[WeightedCall] = []
        self.current: StepRecord | None = None
        self.paused = 0
        self.epoch = 0  # complete inner steps ever
        self.verify_next = True
        self.to_verify: StepRecord | None = None
        self._inside = False
        self._frozen: list[Tensor] = []
        self._task = self._outer_task = -1
        self._outer_grads: list[Tensor | None] = []
        self._grad_version: tuple[int, int] | None = None
        self._handles: list[Any] = []
        for optimizer in self.optimizers:
            pre = uncompiled(self._before_step)
            post = uncompiled(self._after_step)
            self._handles += [
                optimizer.register_step_pre_hook(pre),
                optimizer.register_step_post_hook(post),
            ]

    def watch_outer(self, tensors: Sequence[Tensor]) -> None:
        """Notice gradients that reach outer variables outside the registered losses."""
        for tensor in tensors:
            self._handles.append(
                tensor.register_post_accumulate_grad_hook(self._on_outer_grad)
            )

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.thaw()

    # --- losses -----------------------------------------------------------------------

    def call(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Evaluate a registered inner loss for the user, unchanged, and remember it."""
        self.thaw()
        if self.paused or self._inside or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        problem = self.present
        problem.modules.discover(function, (args, kwargs))
        remembered = record(
            function,
            args,
            kwargs,
            problem,
            keep_buffers=self.window.iterates or self.verify_next,
        )
        self._outer_grads = [tensor.grad for tensor in problem.outer.tensors]
        self._inside = True
        self._freeze()
        try:
            result = function(*args, **kwargs)
        finally:
            self._inside = False
            self.thaw()
        loss = scalar(result, remembered.name)
        if loss.requires_grad:
            _on_gradient(loss, partial(self._on_backward, remembered))
        return result

    def _freeze(self) -> None:
        """Outer variables are constants in the user's own inner call and its backward."""
        for tensor in self.present.constants:
            if tensor.requires_grad:
                tensor.requires_grad_(False)
                self._frozen.append(tensor)

    def thaw(self) -> None:
        """Make outer variables variables again."""
        while self._frozen:
            self._frozen.pop().requires_grad_(True)

    def _on_backward(self, call: Call, weight: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task == self._outer_task:
            self._outside(call.name)
        if task != self._task:  # the first registered loss of this backward
            self._task = task
            if self.pending and self._gradients_are_empty():
                self.pending = []
            self._freeze()  # activation checkpointing runs the forward again
            Variable._execution_engine.queue_callback(self._after_backward)  # type: ignore[attr-defined]
        self.pending.append((call, _number(weight)))

    def _after_backward(self) -> None:
        self.thaw()
        self._grad_version = self._version()

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
        raise OuterOutsideLoss(
            f"The outer variable {', '.join(touched)} received a gradient in the "
            f"backward of {name!r}: it enters the training objective outside the registered "
            "loss, as in (x * loss).backward(). The hypergradient could not see that. Move the "
            "whole expression into the function registered with @optimizer.inner_loss."
        )

    # --- steps ------------------------------------------------------------------------

    def _parameters(self) -> Iterator[Tensor]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    def _version(self) -> tuple[int, int] | None:
        """Identity and version of the first gradient; ``zero_()`` moves it."""
        for parameter in self._parameters():
            if parameter.grad is not None:
                return id(parameter.grad), parameter.grad._version
        return None

    def _gradients_are_empty(self) -> bool:
        """Every inner ``.grad`` is None, or was set to zero since the last backward."""
        version = self._version()
        if version is None:
            return True
        if version == self._grad_version:
            return False
        return not any(
            p.grad is not None and bool(p.grad.any()) for p in self._parameters()
        )

    def _before_step(
        self,
        optimizer: torch.optim.Optimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple, dict] | None:
        self.thaw()
        if self.paused:
            return None
        self.present = self.problem()
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
        calls = self._unscaled(fused_scale)
        self.pending = []
        if self.current is None:
            if not calls and all(p.grad is None for p in self._parameters()):
                return  # a step without any gradient changes nothing
            self.current = StepRecord(self._kept(calls), self.window.count)
            if self.verify_next:
                self.to_verify = StepRecord(calls, self.window.count)
                self.verify_next = False
        elif again:
            self.current.calls, self.current.opaque = self._kept(calls), True
            if (
                self.to_verify is not None
                and self.to_verify.index == self.current.index
            ):
                self.to_verify, self.verify_next = None, True
            return
        elif index in self.current.parts:
            raise BilevelError(
                f"Inner optimizer {index} ({type(optimizer).__name__}) stepped twice while "
                "another inner optimizer has not stepped. With inner=[a, b] one inner step is "
                "one step of each; call optimizer.step(), which steps all of them."
            )
        elif calls:
            self.current.calls = self.current.calls + self._kept(calls)
            if (
                self.to_verify is not None
                and self.to_verify.index == self.current.index
            ):
                self.to_verify.calls = self.to_verify.calls + calls
        wants = self.window.wants_iterate()
        self.current.parts[index] = (
            take_part(optimizer, self.window.pool if wants else None)
            if self.window.iterates
            else _NOTHING
        )
        if self.to_verify is not None and self.to_verify.index == self.current.index:
            if index not in self.to_verify.parts:
                self.to_verify.parts[index] = take_part(
                    optimizer, Pool(), gradients=True, scale=fused_scale
                )

    def _kept(self, calls: list[WeightedCall]) -> list[WeightedCall]:
        """The calls without buffer values, where the trajectory is not replayed.

        Implicit estimators evaluate at the present point, buffers included.
        """
        if self.window.iterates:
            return calls
        return [
            (replace(call, buffers=None) if call.buffers else call, weight)
            for call, weight in calls
        ]

    def _unscaled(self, fused_scale: Tensor | None) -> list[WeightedCall]:
        scale = fused_scale
        if scale is None and self.grad_scaler is not None and self.pending:
            one = torch.ones((), device=self.present.inner.layout.device)
            scale = self.grad_scaler.scale(one)
        if scale is None:
            return self.pending
        return [(call, _number(weight / scale)) for call, weight in self.pending]

    def _after_step(
        self,
        optimizer: torch.optim.Optimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if self.paused or self.current is None:
            return
        if len(self.current.parts) == len(self.optimizers):
            finished, self.current = self.current, None
            self.epoch += 1
            self.window.append(finished)
            self.on_step()

    def restart(self) -> None:
        """Forget pending calls and recorded steps."""
        self.pending, self.current = [], None
        self.window.clear()

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Neither record nor count inside."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1
