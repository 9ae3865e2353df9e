"""The decorators with which losses and gradient transforms are registered."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor

from .. import _checks
from ..errors import BilevelError, BilevelWarning
from ..inner import GradientTransform, Hyperparameters, Rates
from ..problem import DataSource
from .hooks import origin, users_frame
from .levels import parameters
from .losses import InnerLoss, OuterLoss
from .maps import FixedPointMap

if TYPE_CHECKING:
    from ..problem import BilevelProblem
    from .recorder import Recorder

F = TypeVar("F", bound=Callable[..., Any])


class LossRegistry:
    """The registered losses of a `BilevelOptimizer`.

    Attributes:
        inner_losses: name → inner loss.
        outer_losses: name → outer loss.
    """

    inner_losses: dict[str, InnerLoss]
    outer_losses: dict[str, OuterLoss]
    outer: torch.optim.Optimizer
    _recorder: Recorder

    if TYPE_CHECKING:

        @property
        def problem(self) -> BilevelProblem:
            """Both levels at the live parameters."""
            ...

    @overload
    def inner_loss(self, function: F, *, data: Any = ...) -> F: ...
    @overload
    def inner_loss(
        self, function: None = ..., *, data: Any = ...
    ) -> Callable[[F], F]: ...
    def inner_loss(self, function: Any = None, *, data: Any = None) -> Any:
        """Register an inner loss g; a decorator, with or without arguments.

        The decorated function returns what ``function`` returns: a scalar tensor, a tuple whose
        first item is one, or an object with ``.loss``. What is back-propagated of it, with its
        weight, is the inner objective; several may be registered.

        Args:
            function: computes the training loss; every use of an outer variable lies inside it.
            data: where stochastic estimators draw independent batches from, beside those of the
                loop: as in `outer_loss`, or `Batches`. Without it they draw from the recorded
                steps. A tuple or list is unpacked into arguments.

        Returns:
            The function to call in the loop.
        """
        if function is not None and not callable(function):
            raise TypeError(
                f"inner_loss({type(function).__name__}): the first argument is the loss "
                "function. Data is given by name: @optimizer.inner_loss(data=batches)."
            )
        if function is None:
            return lambda f: self.inner_loss(f, data=data)
        name = getattr(function, "__name__", type(function).__name__)
        source = None if data is None else DataSource(data, 1, name, role="inner")
        return self._register(
            self.inner_losses,
            InnerLoss(self, function, source),  # type: ignore[arg-type]
        )

    def fixed_point_map(self, function: Any = None, *, data: Any = None) -> Any:
        """Register the inner problem y = Ψ(y, x), in place of an inner loss; a decorator.

        ``inner`` is a `FixedPointIteration`. Its ``step()`` applies the map, on a fresh sample if
        there is data; calling the decorated function before ``step()`` chooses the arguments.
        The system of an implicit estimator is (I − ∂_yΨᵀ) v = ∂_y f, which is not symmetric.

        Args:
            function: returns the new value of every inner parameter, one tensor or several in the
                order of the optimizer; every use of an outer variable lies inside it.
            data: where every application draws its arguments from, as in `outer_loss`.

        Returns:
            The function to call in the loop.
        """
        if function is None:
            return lambda f: self.fixed_point_map(f, data=data)
        name = getattr(function, "__name__", type(function).__name__)
        source = None if data is None else DataSource(data, 1, name, role="inner")
        if self.inner_losses:
            raise BilevelError(
                f"fixed_point_map({name}): an inner loss is registered "
                f"({', '.join(self.inner_losses)}). The inner problem is a minimum or the fixed "
                "point of one map; register one of them."
            )
        registered = FixedPointMap(self, function, source)  # type: ignore[arg-type]
        self._recorder.apply_map = registered.draw
        return self._register(self.inner_losses, registered)

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
                The mean is that of the batches: examples of a short last one count for more.
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
        source = None if data is None else DataSource(data, batches, name)
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

        It never acts. Unrolled estimators differentiate through it, also with respect to outer
        variables that it uses; every estimator needs it to recognise the step as its own.

        Args:
            transform: a function of the list of gradients of the inner parameters that have
                one, such as ``tb.clip_grad_norm(1.0)``.

        Returns:
            The transform, so that this can be a decorator.
        """
        self._recorder.loop = replace(self._recorder.loop, transform=transform)
        return transform

    def smoothness(self, function: F) -> F:
        """Register constants of the losses, for estimators with ``certify=True``; a decorator.

        Args:
            function: of nothing; returns a `Smoothness` at the present outer variables.

        Returns:
            The function.
        """
        self._recorder.loop = replace(self._recorder.loop, smoothness=function)
        return function

    def inner_hyperparameters(self, function: F) -> F:
        """Let outer variables determine hyperparameters of the inner optimizers; a decorator.

        Before every inner step the function is called and what it returns is written into the
        parameter groups of the inner optimizers, in place of what a scheduler or the user put
        there. Unrolled estimators differentiate through it: learning rates, momentum, weight
        decay, betas. Implicit estimators know only the weight decay, for the point where an
        optimizer comes to rest does not depend on the others.

        Args:
            function: of the number of inner steps since the trajectory began (construction or
                `restart`), or of nothing. Returns a dictionary such as ``{"lr": log_lr.exp()}`` for
                every parameter group that has the option, or a list with a dictionary for each
                group. Values are numbers or tensors of one element; betas are a pair.

        Returns:
            The function.

        Example:
            >>> import torch, torch_bilevel as tb
            >>> y = torch.tensor([4.0], requires_grad=True)
            >>> log_lr = torch.tensor(-1.0, requires_grad=True)
            >>> optimizer = tb.BilevelOptimizer(
            ...     torch.optim.SGD([y], lr=0.1), torch.optim.SGD([log_lr], lr=0.1),
            ...     estimator="unrolled")
            >>> @optimizer.inner_hyperparameters
            ... def schedule(step):
            ...     return {"lr": log_lr.exp()}
            >>> train = optimizer.inner_loss(lambda: (y**2).sum())
            >>> valid = optimizer.outer_loss(lambda: (y**2).sum())
            >>> train().backward(); _ = optimizer.step()
            >>> valid().backward()      # y₁ = (1 − 2 lr) y₀,  dΦ/d log lr = −4 lr y₀ y₁
            >>> bool(torch.isclose(log_lr.grad, -4 * (-1.0 * torch.ones(())).exp() * 4 * y[0]))
            True
        """
        if not callable(function):
            raise TypeError(
                f"inner_hyperparameters({type(function).__name__}): pass a function that returns "
                'a dictionary, such as lambda: {"lr": log_lr.exp()}.'
            )
        self._recorder.loop = replace(
            self._recorder.loop, hyperparameters=Hyperparameters(function)
        )
        return function

    def learn_rates(self, rates: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Let outer variables ρ scale the gradients of the inner parameters, entry by entry.

            g ← ρ ∘ g     in ``.grad``, just before every inner step

        With ``SGD(lr=α)`` the learning rate of an entry is then α ρ. Unrolled estimators
        differentiate through it; implicit ones do not know it, for it does not move the point where
        an optimizer comes to rest.

        Args:
            rates: one tensor for each inner parameter and of its shape, which the outer optimizer
                has. None makes tensors of ones and adds them to it as one more group.

        Returns:
            The rates.

        Raises:
            BilevelError: they do not fit.

        Example:
            >>> import torch, torch_bilevel as tb
            >>> y = torch.tensor([4.0], requires_grad=True)
            >>> x = torch.tensor([1.0], requires_grad=True)
            >>> optimizer = tb.BilevelOptimizer(
            ...     torch.optim.SGD([y], lr=0.25), torch.optim.SGD([x], lr=0.1),
            ...     estimator="unrolled")
            >>> (rate,) = optimizer.learn_rates()
            >>> train = optimizer.inner_loss(lambda: (x * y**2).sum())
            >>> valid = optimizer.outer_loss(lambda: (y**2).sum())
            >>> train().backward(); _ = optimizer.step()
            >>> valid().backward()      # y₁ = (1 − ρ x / 2) y₀ = 2,  dΦ/dρ = −x y₀ y₁
            >>> rate.grad
            tensor([-8.])
        """
        tensors = self.problem.inner.tensors
        if rates is None:
            rates = [torch.ones_like(t).requires_grad_() for t in tensors]
            self.outer.add_param_group({"params": rates})
        known = set(map(id, parameters([self.outer])))
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if [tuple(rate.shape) for rate in rates] != shapes or not all(
            id(rate) in known for rate in rates
        ):
            raise BilevelError(
                f"rates= must be {len(tensors)} tensors, one of the shape of each inner parameter "
                f"({', '.join(map(str, shapes[:4]))}{', …' if len(shapes) > 4 else ''}), all of "
                "them in the outer optimizer. Leave rates= out to have them made and added."
            )
        self._recorder.loop = replace(self._recorder.loop, rates=Rates(list(rates)))
        return list(rates)
