"""Whether somebody besides the inner optimizers writes to their states, between steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class StateVersions:
    """The version counters of optimizer states, as the last step of each left them.

    Args:
        wanted: whether anybody will ask.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._left: dict[int, dict[int, int]] = {}

    def clear(self) -> None:
        """A new trajectory begins: what came before is no matter."""
        self._left = {}

    def leave(self, number: int, state: Mapping[Any, Any]) -> None:
        """A step of an optimizer is over, taken or skipped.

        Args:
            number: of the inner optimizer.
            state: its state.
        """
        if self.wanted:
            self._left[number] = _versions(state)

    def changed(self, number: int, state: Mapping[Any, Any]) -> bool:
        """Whether a state was written to since; a replay notices by itself what was removed."""
        left = self._left.get(number)
        return left is not None and not _versions(state).items() <= left.items()


def _versions(states: Mapping[Any, Any]) -> dict[int, int]:
    return {
        id(value): value._version
        for state in states.values()
        if isinstance(state, Mapping)
        for value in state.values()
        if isinstance(value, Tensor) and not value.is_inference()
    }
