"""What a user does with a `BilevelOptimizer` beside stepping."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from ..inner import fresh_state
from . import state
from .explain import explain
from .report import Report

if TYPE_CHECKING:
    from .bilevel import BilevelOptimizer
    from .recorder import Recorder


class Control:
    """Restarting, pausing, removing, saving."""

    inners: list[torch.optim.Optimizer]
    _recorder: Recorder
    _outer_hooks: OrderedDict[int, Callable[..., Any]]
    _forget_adjoints: Callable[[], None]
    proximal_term: float | None

    def restart(self) -> None:
        """Start a new inner trajectory at the present parameters.

        Drops recorded steps, inner optimizer state and adjoints; parameters stay.
        """
        self._recorder.restart()
        self._recorder.begin(self.proximal_term)
        self._forget_adjoints()
        for optimizer in self.inners:
            optimizer.state.clear()
            optimizer.state.update(fresh_state(optimizer))

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
