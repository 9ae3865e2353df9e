"""What a user does with a `BilevelOptimizer` beside stepping."""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .. import estimators, products
from ..errors import BilevelError, NoOuterStepWarning
from ..estimators import Estimate, Estimator, EstimatorMemory
from ..inner import fresh_state
from ..products import Products
from . import state
from .explain import explain
from .hooks import users_frame, weak
from .report import Report

if TYPE_CHECKING:
    from ..problem import BilevelProblem
    from .bilevel import BilevelOptimizer
    from .recorder import Recorder


class Control:
    """Restarting, pausing, removing, saving."""

    inners: list[torch.optim.Optimizer]
    _recorder: Recorder
    _outer_hooks: OrderedDict[int, Callable[..., Any]]
    _estimator: Estimator
    _products: Products
    _memories: dict[tuple[str, ...], EstimatorMemory]
    _found: dict[tuple[str, ...], Estimate]
    _stood: Tensor | None = None
    _start: list[Tensor] | None = None  # where every trajectory begins
    _warned: set[type[Warning]]
    warm_start: bool
    outer: torch.optim.Optimizer
    proximal_term: float | None
    max_record_bytes: int | None

    if TYPE_CHECKING:

        @property
        def problem(self) -> BilevelProblem:
            """Both levels at the live parameters."""
            ...

    @property
    def estimator(self) -> Estimator:
        """The estimator; assign a name or an object to change it at run time."""
        return self._estimator

    @estimator.setter
    def estimator(self, value: Any) -> None:
        chosen = estimators.parse(value)
        chosen.check(self.inners)
        chosen.check_outer(self.outer)
        before, self._estimator = self._estimator, chosen
        self._recorder.directs = chosen.directs
        self._forget_adjoints()
        window = chosen.new_window(self.max_record_bytes)
        window.adopt(self._recorder.window, follows=chosen == before)
        self._recorder.window = window

    @property
    def products(self) -> Products:
        """The engine of products; assign a name or an object to change it at run time."""
        return self._products

    @products.setter
    def products(self, value: Any) -> None:
        self._products = products.parse(value)

    def _remember_outer(self) -> None:
        """Note where the outer variables stand, for estimators that move them on."""
        if self._estimator.extrapolates:
            self._stood = self.problem.outer.read()

    def _extrapolate(self) -> None:
        """Put the outer variables where the estimator queries next."""
        if not self._estimator.extrapolates or self._stood is None:
            return
        outer, start, self._stood = self.problem.outer, self._stood, None
        rates = [
            torch.full_like(p, float(group["lr"]), requires_grad=False)
            for group in self.outer.param_groups
            for p in group["params"]
        ]
        memory = self._memories.setdefault((), EstimatorMemory())
        state = memory.directions.setdefault("query", {})
        lr = outer.layout.flatten(rates)
        where = self._estimator.query(state, start, outer.read(), lr)
        with torch.no_grad():
            for tensor, value in zip(
                outer.tensors, outer.layout.split(where), strict=True
            ):
                tensor.copy_(value)

    def _forget_adjoints(self) -> None:
        """Start the next solve from zero, estimate step sizes anew, forget directions."""
        self._memories.clear()
        self._found.clear()

    def _warn_once(self, category: type[Warning], text: str) -> None:
        if category not in self._warned:
            self._warned.add(category)
            warnings.warn(text, category, stacklevel=users_frame())

    def _warn_dropped(self, why: str, count: int) -> None:
        if count:
            self._warn_once(
                NoOuterStepWarning,
                f"{why}: {count} recorded inner steps, which no outer step has made use of, were "
                "dropped. Call optimizer.outer_step(...), or back-propagate the registered outer "
                "loss and step, before.",
            )

    def restart(self) -> None:
        """Start a new inner trajectory at the present parameters.

        Drops recorded steps, inner optimizer state and adjoints; parameters stay. With
        ``warm_start=False`` later trajectories begin here too.
        """
        self._start = None
        self._recorder.restart()
        self._recorder.begin(self.proximal_term)
        self._forget_adjoints()
        self._clear_inner_state()
        self._await_trajectory()

    def _clear_inner_state(self) -> None:
        for optimizer in self.inners:
            optimizer.state.clear()
            optimizer.state.update(fresh_state(optimizer))

    def _await_trajectory(self) -> None:
        """Without warm starts: see to it that the next trajectory begins at the start.

        Not at once, so that what the inner steps reached can be evaluated and kept.
        """
        if self.warm_start:
            return
        if self.problem.initial:
            raise BilevelError(
                "warm_start=False, and a parameter is in both optimizers: an initialisation, which "
                "the outer steps move. Every task begins there by itself; leave warm_start out."
            )
        self._recorder.beginning = weak(self._begin_trajectory)

    def _begin_trajectory(self) -> None:
        """Note where the first trajectory begins; put the later ones there."""
        self._recorder.beginning = None
        inner = self.problem.inner
        if self._start is None:
            self._start = [tensor.detach().clone() for tensor in inner.tensors]
            return
        inner.overwrite(self._start)
        self._clear_inner_state()
        self._recorder.begin(self.proximal_term)
        for memory in self._memories.values():
            memory.adjoint = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Train inside without recording or counting: warm-up, another objective."""
        with self._recorder.pausing():
            yield

    def remove(self) -> None:
        """Take every hook off; both optimizers are as if never wrapped."""
        self._recorder.remove()

    def register_outer_step_post_hook(
        self, hook: Callable[[BilevelOptimizer, Report], Any]
    ) -> RemovableHandle:
        """Call ``hook(optimizer, report)`` after every outer step.

        Args:
            hook: the function.

        Returns:
            A handle whose ``remove()`` takes it off.
        """
        handle = RemovableHandle(self._outer_hooks)
        self._outer_hooks[handle.id] = hook
        return handle

    def explain(self) -> str:
        """Who moves what, which batches are used, which engine computes products."""
        return explain(self)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact resume needs, loadable with ``weights_only=True``.

        Both optimizers' states, the values of the outer variables, counters, adjoints, the
        position in the outer data, and the steps recorded since the last outer step. Values of
        inner parameters are not included: save the model's ``state_dict`` beside it.

        Returns:
            A dictionary of plain types and tensors.
        """
        return state.save(self)  # type: ignore[arg-type]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`; register the same losses first.

        Args:
            state_dict: what `state_dict` returned.
        """
        state.load(self, state_dict)  # type: ignore[arg-type]
