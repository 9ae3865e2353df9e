"""The decorators with which losses and gradient transforms are registered."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar, overload

from .. import _checks
from ..errors import BilevelWarning
from ..inner import GradientTransform
from .data import OuterData
from .hooks import origin, users_frame
from .losses import InnerLoss, OuterLoss

F = TypeVar("F", bound=Callable[..., Any])


class LossRegistry:
    """The registered losses of a `BilevelOptimizer`.

    Attributes:
        inner_losses: name → inner loss.
        outer_losses: name → outer loss.
    """

    inner_losses: dict[str, InnerLoss]
    outer_losses: dict[str, OuterLoss]
    _transform: GradientTransform | None

    def inner_loss(self, function: F) -> F:
        """Register an inner loss g; a decorator.

        The decorated function returns what ``function`` returns: a scalar tensor, a tuple whose
        first item is one, or an object with ``.loss``. What is back-propagated of it, with its
        weight, is the inner objective; several may be registered.

        Args:
            function: computes the training loss; every use of an outer variable lies inside it.

        Returns:
            The function to call in the loop.
        """
        return self._register(self.inner_losses, InnerLoss(self, function))  # type: ignore[return-value]

    @overload
    def outer_loss(
        self,
        function: F,
        *,
        data: Any = ...,
        batches: int | str = ...,
        weight: float = ...,
    ) -> F: ...
    @overload
    def outer_loss(
        self,
        function: None = ...,
        *,
        data: Any = ...,
        batches: int | str = ...,
        weight: float = ...,
    ) -> Callable[[F], F]: ...
    def outer_loss(
        self,
        function: Any = None,
        *,
        data: Any = None,
        batches: int | str = 1,
        weight: float = 1.0,
    ) -> Any:
        """Register an outer loss f; a decorator, with or without arguments.

        ``backward()`` of what the decorated function returns *is* the hypergradient, times the
        incoming weight; the inner ``.grad`` stays as it is. Under ``torch.no_grad()`` it is an
        ordinary evaluation.

        Args:
            function: computes the validation loss.
            data: where automatic outer steps draw from: an iterable (restarted when it ends), an
                iterator, or a callable. A tuple or list is unpacked into arguments.
            batches: average over so many batches a step, or ``"all"``; one solve all the same.
            weight: its weight in the sum, when several outer losses are registered.

        Returns:
            The function to call.
        """
        if function is not None and not callable(function):
            raise TypeError(
                f"outer_loss({type(function).__name__}): the first argument is the loss "
                "function. Data is given by name: @optimizer.outer_loss(data=loader)."
            )
        if function is None:
            return lambda f: self.outer_loss(
                f, data=data, batches=batches, weight=weight
            )
        if batches != "all":
            _checks.positive_int("outer_loss", "batches", batches)
        name = getattr(function, "__name__", type(function).__name__)
        source = None if data is None else OuterData(data, batches, name)
        return self._register(
            self.outer_losses,
            OuterLoss(self, function, source, weight),  # type: ignore[arg-type]
        )

    def _register(self, losses: dict[str, Any], loss: Any) -> Any:
        known = losses.get(loss.name)
        if known is not None and origin(known.function) == origin(loss.function):
            warnings.warn(
                f"The loss {loss.name!r} was registered before and is replaced (a cell or a "
                "loop body that ran twice?). Register a loss once, outside the loop; two "
                "losses at once need two names.",
                BilevelWarning,
                stacklevel=users_frame(),
            )
        elif known is not None:
            number, name = 2, loss.name
            while loss.name in losses:
                loss.name, number = f"{name}_{number}", number + 1
        losses[loss.name] = loss
        return loss

    def gradient_transform(self, transform: GradientTransform) -> GradientTransform:
        """Describe what the loop does to the gradients between backward and step.

        It never acts. Unrolled estimators differentiate through it; every estimator needs it to
        recognise the step as its own.

        Args:
            transform: a function of the list of gradients of the inner parameters that have
                one, such as ``tb.clip_grad_norm(1.0)``.

        Returns:
            The transform, so that this can be a decorator.
        """
        self._transform = transform
        return transform
