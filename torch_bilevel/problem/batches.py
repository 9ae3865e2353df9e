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
from ..errors import BilevelError


class Batches:
    """A data set in fixed batches, in random order, each with a number.

    The partition is drawn once, from ``seed``, into parts of nearly equal size: what stochastic
    methods minimise is the mean over the batches, which is then that over the examples up to the
    rounding of sizes. Iterating gives every batch once, in a new order every time; `draw` gives
    independent ones, uniformly with replacement. Both have a random stream of their own: the
    generators of the program never move.

    Args:
        dataset: a tuple of tensors of equal length, a ``TensorDataset``, or any map-style data set
            (whose items are collated as a ``DataLoader`` does).
        batch_size: examples in a batch, at most.
        seed: of the partition and of the order.
        device: where batches are moved; None leaves them where the data set is. (A batch that the
            loop moves itself is another tensor, and its number is lost.)

    Raises:
        ValueError: the data set is empty or has no numbered items, its tensors differ in length, or
            ``batch_size`` is not a positive whole number.

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

    def __init__(
        self, dataset: Any, batch_size: int, seed: int = 0, device: Any = None
    ):
        _checks.positive_int("Batches", "batch_size", batch_size)
        if isinstance(dataset, TensorDataset):
            dataset = dataset.tensors
        self.tensors: Sequence[Tensor] | None = None
        self.dataset = dataset
        if isinstance(dataset, (tuple, list)) and all(
            isinstance(part, Tensor) for part in dataset
        ):
            self.tensors = dataset
        elif not hasattr(dataset, "__getitem__") or isinstance(dataset, dict):
            raise ValueError(
                f"Batches({type(dataset).__name__}): give a tuple of tensors of equal length, or a "
                "data set whose items are looked up by number (loader.dataset of a DataLoader)."
            )
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
        self._parts = torch.tensor_split(order, -(-size // batch_size))
        self._device = device
        self._epochs: list[list[int]] = []  # what is left of those begun, oldest first
        self._resumed: list[int] = []  # of the one that a saved state was in
        self._broken: list[int] = []  # of the last one that was left by a break
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
        return self.moved(batch, self._device, number)

    def moved(self, batch: tuple, device: Any, number: int | None = None) -> tuple:
        """A batch on another device, still known by its number.

        Args:
            batch: what was handed out.
            device: where tensors are moved; None leaves them.
            number: its number, if it is not known yet.
        """
        number = self.number(batch) if number is None else number % len(self)
        if device is not None:
            batch = tuple(to_device(item, device) for item in batch)
        for item in batch:
            if isinstance(item, Tensor) and number is not None:
                self._known[item] = number
        return batch

    def __iter__(self) -> Iterator[tuple]:
        """A new epoch; the first one after `load_state_dict` is what was left of the saved one."""
        left, self._resumed, self._broken = self._resumed, [], []
        if not left:
            left = torch.randperm(len(self), generator=self._generator).tolist()
        self._epochs.append(left)
        try:
            while left:
                yield self[left.pop()]
        finally:  # also when the loop was left by a break
            self._epochs = [epoch for epoch in self._epochs if epoch is not left]
            self._broken = left or self._broken

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
        """Where iteration and random stream are: in the outermost loop, or where it was left."""
        left = self._epochs[0] if self._epochs else self._resumed or self._broken
        generator = self._generator.get_state()
        return {"generator": generator, "order": list(left), "count": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place; the partition is that of ``seed``.

        Raises:
            BilevelError: it was saved of another number of batches.
        """
        if state["count"] != len(self):
            raise BilevelError(
                f"The state is of {state['count']} batches, and there are {len(self)} here. Make "
                "Batches of the same data and batch_size before loading."
            )
        self._generator.set_state(state["generator"])
        self._resumed = list(state["order"])


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors, also inside dictionaries, lists and tuples, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_device(item, device) for item in value)
    return value
