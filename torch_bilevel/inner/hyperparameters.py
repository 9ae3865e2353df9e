"""Hyperparameters of the inner optimizers as functions of the outer variables.

    (y_{k+1}, s_{k+1}) = Φ(y_k, ∇_y g, s_k; h_k(x))

The function is evaluated before every inner step and its numbers are written into the parameter
groups; replay evaluates it again, with a graph, and carries the adjoint of h_k on to x.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidHyperparameters
from .rule import Hyper

Groups = Sequence[Mapping[str, Any]]


class Hyperparameters:
    """A registered function that determines hyperparameters.

    Args:
        function: of the number of inner steps since the trajectory began, or of nothing; returns
            a dictionary for every parameter group, or a list with one for each.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        try:
            inspect.signature(function).bind(0)
            self.takes_position = True
        except (TypeError, ValueError):
            self.takes_position = False
        # per group, what was set, and at which position last
        self._written: dict[int, dict[str, int]] = {}

    def at(self, position: int, groups: Groups) -> list[dict[str, Any]]:
        """What the function sets, per group.

        Args:
            position: inner steps since the trajectory began.
            groups: the parameter groups of all inner optimizers.

        Raises:
            InvalidHyperparameters: it returned something that cannot be set.
        """
        result = self.function(position) if self.takes_position else self.function()
        if isinstance(result, Mapping):
            for key in result:
                if not any(key in group for group in groups):
                    self._refuse(f"set {key!r}, which no group has", groups)
            found = [{k: v for k, v in result.items() if k in g} for g in groups]
        elif isinstance(result, (list, tuple)) and len(result) == len(groups):
            found = [dict(item) for item in result]
        else:
            self._refuse(f"returned {_shortly(result)}", groups)
        for index, (values, group) in enumerate(zip(found, groups, strict=True)):
            for key, value in values.items():
                if key not in group:
                    self._refuse(f"set {key!r}, which group {index} has not", groups)
                if not _fits(value, group[key]):
                    self._refuse(f"set {key!r} to {_shortly(value)}", groups)
                if isinstance(value, Tensor) and isinstance(group[key], Tensor):
                    values[key] = value.to(group[key].dtype)  # as the step sees it
        return found

    @torch.no_grad()
    def numbers(self, position: int, groups: Groups) -> list[dict[str, Any]]:
        """What the function sets, per group, as the numbers a step sees.

        Raises:
            InvalidHyperparameters: one is not finite.
        """
        found = self.at(position, groups)
        for values, group in zip(found, groups, strict=True):
            for key, value in values.items():
                if not _finite(value):
                    self._refuse(f"set {key!r} to {_numbers(value)}", groups)
                if isinstance(group[key], Tensor):
                    values[key] = group[key].new_tensor(float(value))
                else:
                    values[key] = _numbers(value)
        return found

    def write(self, optimizers: Sequence[torch.optim.Optimizer], position: int) -> None:
        """Set the present values in the optimizers' groups."""
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        found = self.numbers(position, groups)
        if position == 0:  # a trajectory begins
            self._written = {}
        for index, values in enumerate(found):
            known = self._written.setdefault(index, {})
            for key in sorted(known.keys() - values.keys()):
                if self._depends(known[key], groups, index, key):
                    what = f"set {key!r} at earlier steps and not at this one"
                    self._refuse(what, groups)
            known.update(dict.fromkeys(values, position))
        for values, group in zip(found, groups, strict=True):
            group.update(values)

    def _depends(self, position: int, groups: Groups, index: int, key: str) -> bool:
        """Whether what was set then is a function of x, which the group would forget."""
        with torch.enable_grad():
            value = self.at(position, groups)[index].get(key)
        several = isinstance(value, (tuple, list))
        return any(
            isinstance(v, Tensor) and v.requires_grad
            for v in (value if several else (value,))
        )

    def _refuse(self, what: str, groups: Groups) -> None:
        options = ", ".join(k for k in groups[0] if k != "params")
        raise InvalidHyperparameters(
            f"The function {self.name!r} registered with @optimizer.inner_hyperparameters {what}. "
            "Return a dictionary of hyperparameters for every parameter group, or a list of "
            f"{len(groups)} dictionaries, one for each, with the same keys at every step; "
            "values are real numbers or tensors of one element (betas: a pair). The first group "
            f"has: {options}."
        )


class HyperAdjoint:
    """Hyperparameters of one step as leaves, and the adjoints they receive.

    Args:
        function: the registered function, or None.
        position: inner steps before this one since the trajectory began.
        groups: the hyperparameters recorded with the step, per group of all inner optimizers.
    """

    def __init__(self, function: Hyperparameters | None, position: int, groups: Groups):
        self.values: list[Tensor] = []  # with graph
        self.leaves: list[Tensor] = []
        self.bars: list[Tensor] = []
        self.groups: list[Hyper] = list(groups)
        if function is None:
            return
        known: dict[int, Tensor] = {}  # one leaf for a value that several groups share
        with torch.enable_grad():  # this may run inside a backward
            found = function.at(position, groups)
            self.groups = [
                {
                    **group,
                    **{k: self._leaf(value, known) for k, value in values.items()},
                }
                for group, values in zip(groups, found, strict=True)
            ]
        self.bars = [torch.zeros_like(leaf) for leaf in self.leaves]

    def _leaf(self, value: Any, known: dict[int, Tensor]) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(self._leaf(item, known) for item in value)
        if not isinstance(value, Tensor) or not value.requires_grad:
            return _numbers(value)
        if id(value) not in known:
            known[id(value)] = value.detach().reshape(()).requires_grad_()
            self.values.append(value.reshape(()))
            self.leaves.append(known[id(value)])
        return known[id(value)]

    def to_outer(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """The adjoints carried on to the outer variables."""
        if not self.leaves:
            return [None] * len(tensors)
        return list(
            torch.autograd.grad(self.values, tensors, self.bars, allow_unused=True)
        )


def _numbers(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_numbers(item) for item in value)
    return value.item() if isinstance(value, Tensor) else value


def _finite(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_finite, value))
    return not isinstance(value, (float, Tensor)) or math.isfinite(value)


def _fits(value: Any, present: Any) -> bool:
    """Whether a value can take the place of the present one."""
    if isinstance(present, (tuple, list)):
        return (
            isinstance(value, (tuple, list))
            and len(value) == len(present)
            and all(map(_fits, value, present))
        )
    if isinstance(present, bool) or not isinstance(present, (int, float, Tensor)):
        return type(value) is type(present)
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shortly(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:60]


def groups_of(parts: Mapping[int, Any]) -> Iterator[Mapping[str, Any]]:
    """The recorded hyperparameters of a step, group by group over all inner optimizers."""
    for number in sorted(parts):
        yield from parts[number].hyper
