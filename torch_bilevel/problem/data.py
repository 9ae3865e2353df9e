"""Where batches come from: an iterable, an iterator, a callable or `Batches`.

Drawing has a random stream of its own, started from the user's generators at the first draw: a
shuffling loader shuffles anew every epoch, and the user's generators never move.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import BilevelError, OuterDataExhausted
from .batches import Batches, to_device
from .randomness import Randomness, preserved


class DataSource:
    """A source of argument tuples for a registered loss.

    Args:
        source: an iterable (restarted when it ends), an iterator, a callable of no arguments, or
            `Batches`.
        batches: how many batches a draw is by default, or ``"all"``.
        name: the loss it feeds, for messages.
        role: ``"outer"`` or ``"inner"``, for messages.
    """

    def __init__(self, source: Any, batches: int | str, name: str, role: str = "outer"):
        self.source = source
        self.role = role
        self.batches = batches
        self.name = name
        self.iterable = hasattr(source, "__iter__") and not hasattr(source, "__next__")
        self.iterator: Iterator | None = source if hasattr(source, "__next__") else None
        self.drawn = 0  # batches drawn in this epoch
        self.stream: Randomness | None = None
        self.epoch_start: Randomness | None = None
        self.generator_start: Tensor | None = None
        if isinstance(source, tuple) and all(isinstance(t, Tensor) for t in source):
            raise BilevelError(
                f"{role}_loss(data=(tensor, ...)): every row of the first tensor would be a batch. "
                "Write data=tb.Batches((x, y), batch_size=64) for minibatches, or data=[(x, y)] "
                "for one batch of everything."
            )
        if not self.iterable and self.iterator is None and not callable(source):
            raise BilevelError(
                f"{role}_loss(data={type(source).__name__}): data must be an iterable such as "
                "a DataLoader, an iterator, or a function that returns a batch."
            )
        if batches == "all" and not self.iterable:
            raise BilevelError(
                'outer_loss(batches="all") needs data that can be iterated again, such as a '
                f"DataLoader or a list, not {type(source).__name__}."
            )

    @property
    def numbered(self) -> Batches | None:
        """The source, if its batches have numbers."""
        return self.source if isinstance(self.source, Batches) else None

    @property
    def in_order(self) -> bool:
        """Whether draws are consecutive batches of one pass, several of them, in its order."""
        if self.numbered is not None or callable(self.source):
            return False
        return not hasattr(self.source, "__len__") or len(self.source) > 1

    def draw(self, device: torch.device, count: int | None = None) -> list[tuple]:
        """Argument tuples on the given device.

        Args:
            device: where tensors are moved.
            count: how many; None takes as many as a hypergradient averages over.
        """
        known = self.numbered
        if known is not None and self.batches != "all":
            drawn = known.draw(count or int(self.batches))
            return [known.moved(batch, device) for batch in drawn]
        if self.batches == "all" and count is None:
            everything = self.everything(device)
            assert everything is not None
            return everything
        with preserved():
            if self.stream is not None:
                self.stream.restore()
            number = int(self.batches) if count is None else count
            batches = [self._next() for _ in range(number)]
            self.stream = Randomness()
        return [_arguments(batch, device) for batch in batches]

    def everything(self, device: torch.device) -> list[tuple] | None:
        """Every batch once, on the given device; None where that cannot be had."""
        known = self.numbered
        if known is not None:
            return [known.moved(known[k], device) for k in range(len(known))]
        if not self.iterable:
            return None
        with preserved():
            if self.stream is not None:
                self.stream.restore()
            batches = [_arguments(batch, device) for batch in self.source]
            self.stream = Randomness()
        if not batches:
            raise self._empty()
        return batches

    def _next(self) -> Any:
        if not self.iterable and self.iterator is None:
            return self.source()
        for _ in range(2):
            if self.iterator is None:
                self._begin_epoch()
            assert self.iterator is not None
            try:
                batch = next(self.iterator)
            except StopIteration:
                if not self.iterable:
                    raise OuterDataExhausted(
                        f"The iterator given as data of the {self.role} loss {self.name!r} has "
                        "ended. Pass something that can be iterated again (a DataLoader, a "
                        "list) or an endless iterator."
                    ) from None
                self.iterator = None
                continue
            self.drawn += 1
            return batch
        raise self._empty()

    def _begin_epoch(self) -> None:
        self.epoch_start = Randomness()
        generator = getattr(self.source, "generator", None)
        if isinstance(generator, torch.Generator):
            self.generator_start = generator.get_state()
        self.iterator = iter(self.source)
        self.drawn = 0

    def _empty(self) -> OuterDataExhausted:
        return OuterDataExhausted(
            f"The data of the {self.role} loss {self.name!r} is empty: iterating over "
            f"{type(self.source).__name__} gave no batch."
        )

    def state_dict(self) -> dict[str, Any]:
        """The position, so that a resumed run draws the same batches."""
        if not self.iterable:
            return {}
        if hasattr(self.source, "state_dict"):
            return {"source": self.source.state_dict()}
        return {
            "drawn": self.drawn,
            "stream": self.stream and self.stream.state_dict(),
            "epoch_start": self.epoch_start and self.epoch_start.state_dict(),
            "generator_start": self.generator_start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; batches already drawn in the epoch are skipped."""
        if not state:
            return
        if "source" in state:
            self.source.load_state_dict(state["source"])
            self.iterator = None
            return
        self.iterator = None
        if state["epoch_start"] is not None:
            with preserved():
                Randomness.from_state_dict(state["epoch_start"]).restore()
                if state["generator_start"] is not None:
                    self.source.generator.set_state(state["generator_start"])
                self._begin_epoch()
                assert self.iterator is not None
                for _ in range(state["drawn"]):
                    next(self.iterator)
                self.drawn = state["drawn"]
        if state["stream"] is not None:
            self.stream = Randomness.from_state_dict(state["stream"])


def _arguments(batch: Any, device: torch.device) -> tuple:
    if not isinstance(batch, (tuple, list)):
        batch = (batch,)
    return tuple(to_device(item, device) for item in batch)
