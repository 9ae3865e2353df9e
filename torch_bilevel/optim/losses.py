"""The decorated losses a user calls.

`InnerLoss` returns what the user's function returns and lets the recorder remember the call.
`OuterLoss` returns a loss whose ``backward()`` is the hypergradient: one `autograd.Function` over
the outer variables, whose forward evaluates the function and whose backward runs the estimator.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InvalidLoss, LossNotRegistered, StalePoint
from ..problem import (
    Call,
    DataSource,
    WeightedCall,
    evaluations,
    record,
    scalar,
    with_loss,
)
from ..second_order import uncompiled

if TYPE_CHECKING:
    from .bilevel import BilevelOptimizer


class InnerLoss:
    """A registered inner loss; call it like the function it wraps.

    Args:
        owner: the optimizer it is registered with.
        function: the user's function.
        data: where stochastic estimators draw fresh batches from, or None.
    """

    def __init__(
        self,
        owner: BilevelOptimizer,
        function: Callable[..., Any],
        data: DataSource | None = None,
    ):
        functools.update_wrapper(self, function)
        self.function = function
        self.data = data
        self.name = getattr(function, "__name__", type(function).__name__)
        self._call = uncompiled(owner._recorder.call)

    def __deepcopy__(self, memo: Any) -> InnerLoss:
        """Itself: a copied module that holds it keeps using the same registration."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the user's function returns; remembered if it is back-propagated."""
        return self._call(self.function, args, kwargs)


class OuterLoss:
    """A registered outer loss; its value's ``backward()`` is the hypergradient.

    Args:
        owner: the optimizer it is registered with.
        function: the user's function.
        data: where automatic outer steps draw batches from, or None.
        weight: its weight in the sum of outer losses of an automatic step.
    """

    def __init__(
        self,
        owner: BilevelOptimizer,
        function: Callable[..., Any],
        data: DataSource | None,
        weight: float,
    ):
        functools.update_wrapper(self, function)
        self.owner = owner
        self.function = function
        self.data = data
        self.weight = weight
        self.name = getattr(function, "__name__", type(function).__name__)
        self._call = uncompiled(self._evaluate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the user's function returns, its loss replaced by one with ∇Φ as gradient."""
        # An ordinary evaluation: without gradients, or as part of another registered loss.
        part = evaluations or self.owner._recorder.inside
        if part or not torch.is_grad_enabled():
            return self.function(*args, **kwargs)
        return self._call(args, kwargs)

    def _evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = Run(self, self.record(args, kwargs))
        loss = HypergradientFunction.apply(run, *run.owner._outer_leaves())
        return with_loss(run.result, loss)

    def __deepcopy__(self, memo: Any) -> OuterLoss:
        """Itself: a copied module that holds it keeps using the same registration."""
        return self

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call as it is made now: present flags, buffers, generators and autocast."""
        self.owner._recorder.thaw()
        problem = self.owner.problem
        problem.modules.discover(self.function, (args, kwargs))
        call = record(self.function, args, kwargs, problem)
        call.flags = call.randomness = None
        return call


class Run:
    """One evaluation of an outer loss, from its forward to its backward.

    Args:
        loss: the registered loss.
        call: how it was called.
    """

    def __init__(self, loss: OuterLoss, call: Call):
        self.loss = loss
        self.owner = loss.owner
        self.call = call
        self.result: Any = None
        self.token: tuple = ()

    def evaluate(self) -> Tensor:
        """The loss with its own graph, kept for the backward."""
        problem = self.owner.problem
        chosen, window = self.owner.estimator, self.owner._recorder.window
        with chosen.differentiating(problem, window), problem.evaluating(self.call):
            self.result = problem.run(self.call)
        self.token = self._now()
        self.value = scalar(self.result, self.call.name)
        return self.value

    def hypergradient(self) -> list[Tensor]:
        """∇Φ, one tensor per outer variable.

        Raises:
            StalePoint: the parameters moved since the loss was evaluated.
        """
        if self._now() != self.token:
            raise StalePoint(
                f"The inner or outer parameters moved between {self.loss.name}(...) and its "
                "backward(). Evaluate the outer loss and back-propagate it without a step in "
                "between; the end of a task moves them back, so call backward() inside it."
            )
        return self.owner._estimate([(self.call, 1.0)], (self.loss.name,), [self.value])

    def _now(self) -> tuple:
        problem = self.owner.problem
        return self.owner._recorder.epoch, problem.inner.token(), problem.outer.token()


class HypergradientFunction(torch.autograd.Function):
    """The outer loss as a function of the outer variables whose gradient is ∇Φ."""

    @staticmethod
    def forward(ctx: Any, run: Run, *outer: Tensor) -> Tensor:
        """Evaluate the user's outer loss at the present point."""
        ctx.run = run
        return run.evaluate().detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """The incoming weight times the hypergradient."""
        parts = ctx.run.hypergradient()
        (weight,) = grads
        return None, *(part * weight.to(part).reshape(()) for part in parts)


def outer_calls(
    optimizer: BilevelOptimizer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Any,
) -> tuple[list[WeightedCall], tuple[str, ...]]:
    """The outer calls a hypergradient is of, and the names of their losses.

    Args:
        optimizer: has the registered losses.
        args: a batch, or nothing to draw batches from the losses' data.
        kwargs: keyword arguments.
        loss: the outer loss to use, or None for all.

    Returns:
        Calls with weights, and names.

    Raises:
        LossNotRegistered: there is no loss, or no data to draw from.
    """
    losses = list(optimizer.outer_losses.values()) if loss is None else [loss]
    if loss is not None and not isinstance(loss, OuterLoss):
        raise LossNotRegistered(
            f"loss={loss!r} is not a registered outer loss. loss= chooses one of several; pass "
            "what @optimizer.outer_loss returned. An argument of that name must be passed to "
            "your loss by position."
        )
    if not losses:
        raise LossNotRegistered(
            "No outer loss is registered. Decorate the validation loss with "
            "@optimizer.outer_loss (or @optimizer.outer_loss(data=valid_loader))."
        )
    if not optimizer.inner_losses:
        raise LossNotRegistered(
            "No inner loss is registered. Decorate the training loss with "
            "@optimizer.inner_loss."
        )
    if args or kwargs:
        if len(losses) > 1:
            raise LossNotRegistered(
                f"Arguments were given, but {len(losses)} outer losses are registered "
                f"({', '.join(item.name for item in losses)}). Say which with loss=."
            )
        return [(losses[0].record(args, kwargs), 1.0)], (losses[0].name,)
    calls: list[WeightedCall] = []
    autocast = _last_autocast(optimizer)
    for item in losses:
        if item.data is None:
            batches = [()] if _takes_nothing(item.function) else None
            if batches is None:
                raise LossNotRegistered(
                    f"The outer loss {item.name!r} has no data to draw from. Register it "
                    "with @optimizer.outer_loss(data=valid_loader), or pass the batch: "
                    "optimizer.outer_step(x, y)."
                )
        else:
            batches = item.data.draw(optimizer.problem.inner.layout.device)
        for batch in batches:
            _check_fits(item, batch)
            call = item.record(batch, {})
            call.autocast = autocast or call.autocast
            calls.append((call, item.weight / len(batches)))
    return calls, tuple(item.name for item in losses)


def _last_autocast(optimizer: BilevelOptimizer) -> list:
    """Automatic outer losses run under the autocast of the last inner call."""
    records = [record for record in optimizer._recorder.window if record.calls]
    return records[-1].calls[-1][0].autocast if records else []


def _check_fits(loss: OuterLoss, batch: tuple[Any, ...]) -> None:
    """Say how a batch was unpacked when the loss cannot take it."""
    try:
        signature = inspect.signature(loss.function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*batch)
    except TypeError as error:
        kinds = ", ".join(type(value).__name__ for value in batch)
        raise InvalidLoss(
            f"The outer loss {loss.name!r}{signature} cannot take a batch of its data as "
            f"{len(batch)} argument(s) ({kinds}): {error}. A tuple or list is unpacked into "
            "arguments, anything else (a dict, a tensor) is the one argument; data=(X, y) is "
            "iterated as two batches, data=[(X, y)] as one."
        ) from None


def _takes_nothing(function: Callable[..., Any]) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        inspect.signature(function).bind()
        return True
    return False
