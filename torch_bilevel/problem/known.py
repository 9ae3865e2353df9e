"""Functions that were looked at, remembered by identity and not kept alive.

Losses are registered anew for every task, as closures over its data: a set of functions would keep
all of them, and a set of their ids would take a new function for a dead one at its address.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


class KnownFunctions:
    """What is known of functions, by identity, without those that are gone."""

    def __init__(self) -> None:
        self._references: dict[int, tuple[Callable[[], Any], Any]] = {}

    def __contains__(self, function: object) -> bool:
        reference, _ = self._references.get(id(function), (lambda: None, None))
        return reference() is function

    def get(self, function: object, default: Any = None) -> Any:
        """What was remembered with a function."""
        return self._references[id(function)][1] if function in self else default

    def add(self, function: Any, value: Any = None) -> None:
        """Remember a function, with a value; one that has no weak references is kept alive."""
        key, references = id(function), self._references

        def forget(reference: Any) -> None:
            if references.get(key, (None, None))[0] is reference:
                del references[key]

        try:
            references[key] = weakref.ref(function, forget), value
        except TypeError:
            references[key] = (lambda: function), value
