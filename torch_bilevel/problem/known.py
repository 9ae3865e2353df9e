"""Functions that were looked at, remembered by identity and not kept alive.

Losses are registered anew for every task, as closures over its data: a set of functions would keep
all of them, and a set of their ids would take a new function for a dead one at its address.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


class KnownFunctions:
    """A set of functions by identity, without those that are gone."""

    def __init__(self) -> None:
        self._references: dict[int, Callable[[], Any]] = {}

    def __contains__(self, function: object) -> bool:
        reference = self._references.get(id(function))
        return reference is not None and reference() is function

    def add(self, function: Any) -> None:
        """Remember a function; one that has no weak references is kept alive."""
        key, references = id(function), self._references

        def forget(reference: Any) -> None:
            if references.get(key) is reference:
                del references[key]

        try:
            references[key] = weakref.ref(function, forget)
        except TypeError:
            references[key] = lambda: function
