"""Numbered batches of a data set: a fixed partition that can be drawn from again and again.

Variance-reduced methods (SAGA) keep a table with a row for every batch, and stochastic estimators
need independent batches besides those of the loop; both need to know which batch is which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate
from torch.utils.weak import WeakIdKeyDictionary

from .. import _checks


class Batches:
    """A data set in fixed batches, in random order, each with a number.

    The partition is drawn once, from ``seed``. Iterating gives every batch once, in a new order
    every epoch; `draw` gives independent ones, uniformly with replacement. Both have a random
    stream of their own: the generators of the program never move.

    Args:
        dataset: a tuple of tensors of equal length, a ``TensorDataset``, or any map-style data set
            (whose items are collated as a ``DataLoader`` does).
        batch_size: examples in a batch; the last one may be smaller.
        seed: of the partition and of the order.

    Raises:
        ValueError: the data set is empty, its tensors differ in length, or ``batch_size`` is not
            a positive whole number.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> batches = tb.Batches((torch.arange(6.0), torch.arange(6)), batch_size=2)
        >>> len(batches)
        3
        >>> sorted(int(i) for _, index in batches for i in index)
        [0, 1, 2, 3, 4, 5]
        >>> x, index = batches[0]
        >>> batches.number((x, index))
        0
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int = 0):
        _checks.positive_int("Batches", "batch_size", batch_size)
        if isinstance(dataset, TensorDataset):
            dataset = dataset.tensors
        self.tensors: Sequence[Tensor] | None = None
        self.dataset = dataset
        if isinstance(dataset, (tuple, list)) and all(
            isinstance(part, Tensor) for part in dataset
        ):
            self.tensors = dataset
        size = len(self.tensors[0] if self.tensors else dataset)
        if not size or any(len(part) != size for part in self.tensors or ()):
            lengths = [len(part) for part in self.tensors or (dataset,)]
            raise ValueError(
                f"Batches(dataset): the lengths are {lengths}; give a data set that is not empty, "
                "or a tuple of tensors of equal length."
            )
        self.batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(size, generator=self._generator)
        self._parts = torch.split(order, batch_size)
        self._order: list[int] = []  # what is left of this epoch
        self._known = WeakIdKeyDictionary()  # tensor that was handed out → its number

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> tuple:
        """The batch of that number."""
        part = self._parts[number]
        if self.tensors is not None:
            batch = tuple(t[part.to(t.device)] for t in self.tensors)
        else:
            batch = default_collate([self.dataset[i] for i in part.tolist()])
            batch = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        for item in batch:
            if isinstance(item, Tensor):
                self._known[item] = number % len(self)
        return batch

    def __iter__(self) -> Iterator[tuple]:
        """What is left of the epoch, or a new one."""
        if not self._order:
            self._order = torch.randperm(len(self), generator=self._generator).tolist()
        while self._order:
            yield self[self._order.pop()]

    def draw(self, count: int = 1) -> list[tuple]:
        """Independent batches, uniformly with replacement."""
        numbers = torch.randint(len(self), (count,), generator=self._generator)
        return [self[number] for number in numbers.tolist()]

    def number(self, batch: Sequence[Any]) -> int | None:
        """The number of a batch that was handed out, by the identity of its tensors."""
        for item in batch:
            if isinstance(item, Tensor) and item in self._known:
                return self._known[item]
        return None

    def state_dict(self) -> dict[str, Any]:
        """Where iteration and random stream are."""
        return {"generator": self._generator.get_state(), "order": list(self._order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place; the partition is that of ``seed``."""
        self._generator.set_state(state["generator"])
        self._order = list(state["order"])
