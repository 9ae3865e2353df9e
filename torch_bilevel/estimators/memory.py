"""What a direction remembers: the average of its past, the last point, a table of batches.

A stochastic direction d(z; ξ) at the point z = (x, y, …) on the sample ξ becomes

    plain            d_k = d(z_k; ξ_k)
    moving average   d_k = (1 − a) d_{k−1} + a d(z_k; ξ_k)
    STORM            d_k = d(z_k; ξ_k) + (1 − a_k)(d_{k−1} − d(z_{k−1}; ξ_k))
    SARAH, PAGE      d_k = d_{k−1} + d(z_k; ξ_k) − d(z_{k−1}; ξ_k), now and then a full pass
    SAGA             d_k = d(z_k; ξ_i) − T_i + mean(T),    then T_i ← d(z_k; ξ_i)

Both evaluations of STORM, SARAH and PAGE are on the *same* sample. The first direction is the plain
(or full) one, never zero. Law: without noise plain, STORM, SARAH and PAGE are the same trajectory;
SAGA is with one batch (rows of several batches are of different ages also without noise).
"""

from __future__ import annotations

import abc
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks, _registry
from .._registry import changed, describe
from ..errors import BilevelError

State = dict[str, Any]


class DirectionMemory(abc.ABC):
    """A way to remember past directions; subclasses are frozen dataclasses.

    The state is a dictionary of tensors and numbers, empty at the start.
    """

    name: ClassVar[str]
    looks_back: ClassVar[bool] = False  # evaluates the last point again
    every_step: ClassVar[bool] = False  # nested methods update ĝ at every inner step

    def __str__(self) -> str:
        return describe(self.name, changed(self))

    def refreshes(self, state: State) -> bool:
        """Whether the coming direction is to be that of a full pass."""
        return False

    def begin(self, known: State) -> State:
        """A copy of what is remembered to go on from; it stays until a step is taken."""
        return dict(known)

    @abc.abstractmethod
    def direction(
        self,
        state: State,
        new: Tensor,
        old: Callable[[], Tensor],
        row: Callable[[], tuple[int, int]],
    ) -> Tensor:
        """The direction to step along; updates ``state``.

        Args:
            state: what is remembered; belongs to one variable.
            new: d(z_k; ξ_k), flat.
            old: gives d(z_{k−1}; ξ_k).
            row: gives the number of the batch, and how many there are.
        """


@dataclass(frozen=True)
class Plain(DirectionMemory):
    """No memory: the direction is that of the present sample.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.Plain())
        'plain'
    """

    name: ClassVar[str] = "plain"

    def direction(self, state: State, new: Tensor, old: Any, row: Any) -> Tensor:
        """The new one; see `DirectionMemory.direction`."""
        return new


@dataclass(frozen=True)
class MovingAverage(DirectionMemory):
    """An exponential moving average (MA-SOBA, Chen et al. 2023): d ← (1 − a) d + a d(z; ξ).

    Costs one vector. A momentum method also without noise.

    Args:
        weight: a, of the new direction.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.MovingAverage(weight=0.2))
        'moving_average(weight=0.2)'
    """

    weight: float = 0.1

    name: ClassVar[str] = "moving_average"

    def __post_init__(self) -> None:
        _fraction("MovingAverage", "weight", self.weight)

    def direction(self, state: State, new: Tensor, old: Any, row: Any) -> Tensor:
        """(1 − a) d + a d(z; ξ); see `DirectionMemory.direction`."""
        known = state.get("direction")
        d = new if known is None else torch.lerp(known, new, self.weight)
        state["direction"] = d
        return d


@dataclass(frozen=True)
class Storm(DirectionMemory):
    """Recursive momentum (STORM, Cutkosky & Orabona 2019): MRBO, SUSTAIN.

    a_k = weight·(offset/(offset + k))^power. ``weight=1`` is plain, with ``power=0`` for ever.
    Costs one more evaluation, on the same sample at the last point, and three vectors.

    Args:
        weight: a_0, of the new direction.
        offset: steps until a begins to fall, in steps.
        power: 2/3 is the theory's (a ∝ η², η ∝ k^{−1/3}).

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.Storm(weight=0.5, power=0.0))
        'storm(weight=0.5, power=0.0)'
    """

    weight: float = 0.9
    offset: float = 10.0
    power: float = 2 / 3

    name: ClassVar[str] = "storm"
    looks_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _fraction("Storm", "weight", self.weight)
        _checks.real("Storm", "offset", self.offset, positive=True)
        _checks.real("Storm", "power", self.power)

    def direction(
        self, state: State, new: Tensor, old: Callable[[], Tensor], row: Any
    ) -> Tensor:
        """d(z_k; ξ) + (1 − a)(d − d(z_{k−1}; ξ)); see `DirectionMemory.direction`."""
        k = state.get("count", 0)
        a = self.weight * (self.offset / (self.offset + k)) ** self.power
        known = state.get("direction")
        d = new if known is None or a == 1 else new + (1 - a) * (known - old())
        state["direction"], state["count"] = d, k + 1
        return d


class Recursive(DirectionMemory):
    """Recursive differences, and full passes now and then."""

    looks_back: ClassVar[bool] = True
    every_step: ClassVar[bool] = True

    @abc.abstractmethod
    def refreshes(self, state: State) -> bool:
        """Whether the coming direction is to be that of a full pass."""

    def direction(
        self, state: State, new: Tensor, old: Callable[[], Tensor], row: Any
    ) -> Tensor:
        """Along d + d(z_k; ξ) − d(z_{k−1}; ξ); see `DirectionMemory.direction`."""
        d = new if self.refreshes(state) else state["direction"] + new - old()
        state["direction"], state["count"] = d, state.get("count", 0) + 1
        return d


@dataclass(frozen=True)
class Sarah(Recursive):
    """Recursive differences with a full pass every ``period`` steps (SARAH, SPIDER): VRBO, SRBA.

    Costs one more evaluation at the last point, and three vectors; a full pass is over all of
    the data the losses were registered with.

    Args:
        period: inner steps from one full pass to the next; 1 is a full pass always.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.Sarah(period=5))
        'sarah(period=5)'
    """

    period: int = 3

    name: ClassVar[str] = "sarah"

    def __post_init__(self) -> None:
        _checks.positive_int("Sarah", "period", self.period)

    def refreshes(self, state: State) -> bool:
        """Every ``period`` steps; see `DirectionMemory.refreshes`."""
        return state.get("count", 0) % self.period == 0


@dataclass(frozen=True)
class Page(Recursive):
    """As `Sarah`, with a full pass by chance (PAGE, Li et al. 2021): SPABA.

    Args:
        probability: of a full pass.
        seed: of chance.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.Page(probability=0.25))
        'page(probability=0.25)'
    """

    probability: float = 0.1
    seed: int = 0

    name: ClassVar[str] = "page"

    def __post_init__(self) -> None:
        _fraction("Page", "probability", self.probability)

    def refreshes(self, state: State) -> bool:
        """At the first step, and by chance; see `DirectionMemory.refreshes`."""
        count = state.get("count", 0)
        chance = random.Random(self.seed * 1_000_003 + count).random()
        return count == 0 or chance < self.probability


@dataclass(frozen=True)
class Saga(DirectionMemory):
    """A table with the last direction of every batch (SAGA, Defazio et al. 2014): SABA.

    Needs numbered batches (`Batches`). Costs no evaluation, and a table of one vector per batch.

    Args:
        max_bytes: refuse a table larger than this; SABA has five.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.Saga())
        'saga'
    """

    max_bytes: int = 2**30

    name: ClassVar[str] = "saga"

    def __post_init__(self) -> None:
        _checks.positive_int("Saga", "max_bytes", self.max_bytes)

    def begin(self, known: State) -> State:
        """See `DirectionMemory.begin`; rows that a step was taken along go into the table."""
        for number, row in known.get("rows", {}).items():
            known["table"][number] = row
        return {**known, "rows": {}}

    def direction(
        self,
        state: State,
        new: Tensor,
        old: Any,
        row: Callable[[], tuple[int, int]],
    ) -> Tensor:
        """d(z; ξ_i) − T_i + mean(T); see `DirectionMemory.direction`."""
        number, rows = row()
        if "table" not in state:
            size = rows * new.numel() * new.element_size()
            if size > self.max_bytes:
                raise BilevelError(
                    f"A SAGA table of {rows:,} batches and {new.numel():,} numbers takes "
                    f"{size / 2**20:,.0f} MiB, more than max_bytes = "
                    f"{self.max_bytes / 2**20:,.0f} MiB. Use larger batches (fewer rows), "
                    "memory='storm' (three vectors), or raise max_bytes."
                )
            state["table"] = new.new_zeros(rows, new.numel())
            state["mean"] = torch.zeros_like(new)
        before = state["rows"].get(number)
        change = new - (state["table"][number] if before is None else before)
        d = change + state["mean"]
        state["mean"] = state["mean"] + change / rows
        state["rows"][number] = new
        return d


MEMORIES: dict[str, type[DirectionMemory]] = {
    cls.name: cls
    for cls in list(globals().values())
    if isinstance(cls, type)
    and issubclass(cls, DirectionMemory)
    and not inspect.isabstract(cls)
}
"""Name → class."""


def parse_memory(spec: Any) -> DirectionMemory:
    """The memory that a name, a name with options, or an object stands for.

    Raises:
        UnknownName: no memory or option has that name.
    """
    if isinstance(spec, DirectionMemory):
        return spec
    if not isinstance(spec, str):
        raise _registry.UnknownName(
            f"memory={spec!r}: write a name such as 'storm', or an object such as tb.Storm()."
        )
    name, options = _registry.parse(spec, MEMORIES, "memory")
    return _registry.build(MEMORIES[name], options, name)


def _fraction(owner: str, name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{owner}({name}={value!r}): {name} must lie in (0, 1].")
