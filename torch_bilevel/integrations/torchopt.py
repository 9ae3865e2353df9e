"""TorchOpt's gradient transformations as inner optimizers, and its ``custom_root``.

    (u, s') = transformation.update(∇_y g, s, params=y);    y ← y + u

`Optimizer` applies a transformation, such as ``torchopt.adam(1e-2)``, to one parameter at a time,
so it has a step, a state and an update rule like the classes of ``torch.optim``. A transformation
hides its learning rate, weight decay and sign in closures; what is needed of them is found by
trying it. `custom_root` is TorchOpt's decorator on this library's implicit differentiation.
``torchopt`` is imported by `wrap` only.
"""

from __future__ import annotations

import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..inner import Stationarity, register_update_rule
from ..inner.rule import Hyper, State
from ._custom_root import custom_root
from ._transformation import Transformation

__all__ = ["Optimizer", "custom_root", "wrap"]

_KNOWN: weakref.WeakValueDictionary[str, Transformation] = weakref.WeakValueDictionary()


class Optimizer(torch.optim.Optimizer):
    """A TorchOpt gradient transformation as a ``torch.optim.Optimizer``.

        (u, s) ← transformation(∇_y g, s, y);    y ← y + u

    Every estimator works with it. Unrolled ones differentiate TorchOpt's own update, with the
    derivative of √v taken as 0 where v = 0 (TorchOpt's is NaN there, as with a dead unit and
    Adam). Implicit ones use the sign and the weight decay found by trying the transformation.

    The state of a parameter is a flat dictionary of tensors and numbers, saved by
    ``state_dict()``; the transformation is not saved: construct with the same one before loading.
    A parameter group may have a ``transformation`` of its own.

    Needs: a transformation that treats each parameter by itself, is a function of its state, and
    has no in-place effects. Costs: one call of ``update`` per parameter and step.

    Args:
        params: parameters or parameter groups, as in ``torch.optim``.
        transformation: an object with TorchOpt's ``init`` and ``update``.

    Raises:
        TypeError: the transformation has no ``init`` and ``update``.
        ValueError: it mixes parameters, as ``torchopt.clip_grad_norm`` does; its update is not a
            function of its state, as that of ``torchopt.sgd`` with dampening; or an option, such
            as the learning rate, is a tensor that requires grad.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> import torchopt
        >>> from torch_bilevel.integrations.torchopt import Optimizer
        >>> y = torch.ones(2, requires_grad=True)
        >>> optimizer = Optimizer([y], torchopt.sgd(0.1))
        >>> (y**2).sum().backward()
        >>> optimizer.step()
        >>> y.detach()
        tensor([0.8000, 0.8000])
    """

    def __init__(self, params: Iterable[Any], transformation: Any):
        self._updates: dict[str, Transformation] = {}
        super().__init__(params, {"transformation": transformation})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in ``torch.optim``; see the class for its ``transformation``."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            update = Transformation(group["transformation"])
            update.check([p.shape for p in group["params"]])
        except Exception:
            del self.param_groups[-1]
            raise
        # Groups are saved with recorded steps, closures cannot be: a name stands for them.
        group["transformation"] = name = uuid.uuid4().hex
        self._updates[name] = _KNOWN[name] = update

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step, as in ``torch.optim``.

        Args:
            closure: evaluates the loss again.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = _of(group)
            for p in group["params"]:
                if p.grad is not None:
                    value, self.state[p] = update(p, p.grad, self.state[p], False)
                    p.copy_(value)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned.

        Args:
            state_dict: of an optimizer with the same transformations.
        """
        own = [group["transformation"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for name, group in zip(own, self.param_groups, strict=True):
            saved = group["transformation"]
            # Steps recorded by a living optimizer stay with its transformation; those of another
            # process are taken for steps of this one (replay compares their values).
            self._updates[saved] = _KNOWN.setdefault(saved, self._updates[name])
            group["transformation"] = name

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_updates": self._updates}


def wrap(optimizer: Any) -> Optimizer:
    """Make an `Optimizer` of a TorchOpt one, such as ``torchopt.Adam(params, lr=1e-2)``.

    Args:
        optimizer: an instance of ``torchopt.Optimizer`` that has not stepped yet.

    Returns:
        An optimizer with its parameters and its transformation.

    Raises:
        ImportError: TorchOpt is not installed.
        TypeError: it is not a ``torchopt.Optimizer``.
        ValueError: it has stepped, and its state is of all parameters together.

    Example:
        >>> import torch, torchopt
        >>> from torch_bilevel.integrations.torchopt import wrap
        >>> y = torch.ones(2, requires_grad=True)
        >>> optimizer = wrap(torchopt.SGD([y], lr=0.1))
        >>> y.sum().backward()
        >>> optimizer.step()
        >>> y.detach()
        tensor([0.9000, 0.9000])
    """
    torchopt = _library()
    if not isinstance(optimizer, torchopt.Optimizer):
        raise TypeError(
            f"wrap({type(optimizer).__name__}): it takes a torchopt.Optimizer such as "
            "torchopt.Adam(model.parameters()). A transformation such as torchopt.adam(1e-3) goes "
            "to Optimizer(params, transformation); torchopt.Meta* have no counterpart: an "
            "unrolled estimator differentiates ordinary steps."
        )
    if any(type(s).__name__ != "UninitializedState" for s in optimizer.state_groups):
        raise ValueError(
            f"wrap({type(optimizer).__name__}): it has taken steps, and its state is of all "
            "parameters together. Wrap it before its first step."
        )
    groups = [{"params": list(tensors)} for tensors in optimizer.param_groups]
    return Optimizer(groups, optimizer.impl)


def _library() -> Any:
    """The package ``torchopt``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports deprecated parts of torch
            import torchopt
    except ImportError as error:
        raise ImportError(
            "torch_bilevel.integrations.torchopt.wrap needs TorchOpt: pip install torchopt"
        ) from error
    return torchopt


def _of(hyper: Hyper) -> Transformation:
    return _KNOWN[hyper["transformation"]]


def apply_transformation(
    parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper
) -> tuple[Tensor, State]:
    """One step of a transformation; see `Optimizer`."""
    return _of(hyper)(parameter, gradient, state)


def _rest(
    parameter: Tensor, gradient: Tensor | None, state: State, hyper: Hyper
) -> Stationarity:
    """Where a transformation comes to rest: ±∇_y g + wd·y = 0."""
    return _of(hyper).rest(parameter.shape)


# Not taken in pieces or end to end: a mask may look at a parameter's shape.
register_update_rule(Optimizer, apply_transformation, _rest, elementwise=False)
