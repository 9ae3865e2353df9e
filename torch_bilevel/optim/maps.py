"""The decorated fixed-point map a user calls, or that the inner step calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..problem import DataSource, evaluations, record, residual
from ..second_order import uncompiled

if TYPE_CHECKING:
    from .bilevel import BilevelOptimizer


class FixedPointMap:
    """A registered map Ψ; calling it puts y − Ψ(y, x) into ``.grad``, as a backward would.

    Args:
        owner: the optimizer it is registered with.
        function: the user's function.
        data: where every application draws a fresh sample from, or None.
    """

    def __init__(
        self,
        owner: BilevelOptimizer,
        function: Callable[..., Any],
        data: DataSource | None,
    ):
        functools.update_wrapper(self, function)
        self.owner = owner
        self.function = function
        self.data = data
        self.name = getattr(function, "__name__", type(function).__name__)
        self._call = uncompiled(self._apply)

    def __deepcopy__(self, memo: Any) -> FixedPointMap:
        """Itself: a copied module that holds it keeps using the same registration."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ψ at the present point; its residual is what the coming inner step consumes."""
        recorder = self.owner._recorder
        aside = recorder.removed or recorder.paused or evaluations
        if aside or not torch.is_grad_enabled():
            return self.function(*args, **kwargs)
        return self._call(args, kwargs)

    def draw(self) -> None:
        """Apply the map on a fresh sample of its data, or on no arguments."""
        device = self.owner.problem.inner.layout.device
        args = () if self.data is None else self.data.draw(device)[0]
        self(*args)

    def _apply(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recorder, problem = self.owner._recorder, self.owner.problem
        recorder.thaw()
        if recorder.beginning is not None and not recorder.paused:
            recorder.beginning()
        recorder.present = problem
        problem.modules.discover(self.function, (args, kwargs))
        keep = recorder.window.iterates or recorder.verify_next
        call = replace(record(self.function, args, kwargs, problem, keep), is_map=True)
        with torch.no_grad():
            result = self.function(*args, **kwargs)
            parts = residual(call, result, problem.inner.tensors)
        for tensor, part in zip(problem.inner.tensors, parts, strict=True):
            tensor.grad = part
        recorder.pending = [(call, 1.0)]
        return result
