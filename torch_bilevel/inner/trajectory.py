"""The record of inner steps since the last outer step.

    part     what one inner optimizer's step started from: parameters, state, hyperparameters
    step     the weighted calls whose gradient it consumed, and one part per inner optimizer
    window   the steps since the last outer step, oldest first

Estimators that need no trajectory keep only the calls (references to batches).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import TrajectoryTooLong
from ..problem import WeightedCall
from .pool import Pool
from .versions import StateVersions

if TYPE_CHECKING:
    from .tangent import Tangents


@dataclass(slots=True)
class Part:
    """One inner optimizer's side of a step.

    Attributes:
        hyper: per parameter group, the options at the time of the step.
        groups: per parameter, the index of its group.
        present: per parameter, whether it had a gradient (torch skips it otherwise).
        values: the parameters before the step; None if not recorded.
        versions: of the parameters then, None likewise.
        state: the optimizer state before the step, per parameter; None if not recorded.
        gradient: what the step consumed, kept for the step that is verified.
    """

    hyper: list[dict[str, Any]]
    groups: list[int]
    present: list[bool]
    values: list[Tensor] | None = None
    versions: list[int] | None = None
    state: list[dict[str, Any]] | None = None
    gradient: list[Tensor | None] | None = None


@dataclass(slots=True)
class StepRecord:
    """One inner step.

    Attributes:
        calls: recorded calls and the weights they were back-propagated with.
        parts: one per inner optimizer that has stepped.
        index: its number in the window, from 0.
        position: its number since the trajectory began (construction, restart), from 0.
        opaque: the closure ran several times; only implicit estimators can use it.
        rewritten: somebody wrote to the optimizers' state since the step before.
    """

    calls: list[WeightedCall]
    index: int
    position: int = 0
    parts: dict[int, Part] = field(default_factory=dict)
    opaque: bool = False
    rewritten: bool = False

    @property
    def has_iterate(self) -> bool:
        """Whether the parameters before the step were recorded."""
        return bool(self.parts) and all(
            part.values is not None for part in self.parts.values()
        )

    @property
    def replayable(self) -> bool:
        """Whether hyperparameters were recorded, for an estimator that replays."""
        return all(part.hyper for part in self.parts.values())

    def present(self) -> list[bool]:
        """Per parameter, whether it had a gradient, over all inner optimizers."""
        return [there for i in sorted(self.parts) for there in self.parts[i].present]

    def values(self) -> list[Tensor]:
        """The parameters before the step, over all inner optimizers."""
        return [
            v for index in sorted(self.parts) for v in self.parts[index].values or ()
        ]

    def versions(self) -> list[int]:
        """Of the parameters before the step, over all inner optimizers."""
        return [v for i in sorted(self.parts) for v in self.parts[i].versions or ()]

    def states(self) -> list[dict[str, Any]]:
        """The optimizer state before the step, over all inner optimizers."""
        return [
            s for index in sorted(self.parts) for s in self.parts[index].state or ()
        ]

    def gradients(self) -> list[Tensor | None]:
        """What the step consumed, over all inner optimizers."""
        return [
            g for index in sorted(self.parts) for g in self.parts[index].gradient or ()
        ]


class Window:
    """The steps since the last outer step, task start or restart.

    Args:
        last: how many steps to keep; None keeps all.
        iterates: copy parameters and optimizer state before the steps.
        checkpoint_every: copy them before every c-th step only; ``"auto"`` doubles c, and drops
            every other copy, whenever more than 2 c are kept: at most about 1.4 √K.
        iterate_bytes: limit on the copies and on the about √c that exist of a segment when it is
            stepped through again; c is doubled to keep it.
        offload: device for the iterates, such as ``"cpu"``.
        keep_graph: keep the graphs of the user's own evaluations too.
        carry: keep the tangents when the window is cleared after an outer step.
        max_bytes: limit on what is recorded; None takes half of the free memory.
    """

    def __init__(
        self,
        last: int | None = None,
        iterates: bool = False,
        checkpoint_every: int | str | None = None,
        iterate_bytes: int | None = None,
        offload: str | None = None,
        keep_graph: bool = False,
        carry: bool = False,
        max_bytes: int | None = None,
    ):
        self.last = last
        self.iterates = iterates
        self.auto = checkpoint_every == "auto"
        self.first_interval = 1 if self.auto else int(checkpoint_every or 1)
        self.interval = self.first_interval
        self.iterate_bytes = iterate_bytes
        self.keep_graph = keep_graph
        self.max_bytes = max_bytes
        self.pool = Pool(offload)
        self.records: deque[StepRecord] = deque()
        self.count = 0  # steps seen since the window began
        self.number = 0  # windows before this one
        self.carry = carry
        self.tangents: Tangents | None = None  # of an estimator that follows the loop
        self._check_at = 0  # the count at which memory is looked at again
        self.moved: list[bool] = []  # per inner parameter, whether a step has moved it
        self.versions = StateVersions(iterates)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self.records)

    def steps(self, last: int | None = None) -> list[StepRecord]:
        """The steps that are kept: all, or the last ``last``, which an estimator is about."""
        return list(self.records)[-(last or 0) :]

    def wants_iterate(self) -> bool:
        """Whether the next step's starting point is to be copied."""
        return self.iterates and self.count % self.interval == 0

    def append(self, record: StepRecord) -> None:
        """Add a finished step; drop those that no estimator will look at.

        Raises:
            TrajectoryTooLong: the records exceed ``max_bytes``.
        """
        self.records.append(record)
        self.count += 1
        if self.iterates:
            for call, _ in record.calls:
                if call.kept is not None:
                    call.kept.saved.values = record.values()
                    call.kept.saved.versions = record.versions()
            moved = record.present()
            self.moved = [
                a or b for a, b in zip(self.moved or moved, moved, strict=True)
            ]
            self._drop_unreachable()
            if record.has_iterate and (self.auto or self.iterate_bytes):
                self._thin(record)
        elif self.last is not None and len(self.records) > self.last:
            self.records.popleft()
        if self.count >= self._check_at:
            self._check_memory()

    def _drop_unreachable(self) -> None:
        """Drop everything before the newest usable starting point of the last steps."""
        start = 0 if self.last is None else len(self.records) - self.last
        while start > 0 and not self.records[start].has_iterate:
            start -= 1
        for _ in range(start):
            self._release(self.records.popleft())

    def _thin(self, newest: StepRecord) -> None:
        """Double the interval between iterates until there are few enough."""
        kept = [record for record in self.records if record.has_iterate]
        size = sum(
            t.numel() * t.element_size()
            for t in tensors_of(newest.values(), newest.states())
        )

        def needed() -> int:  # the last point's values outlive it a little
            return (len(kept) + math.isqrt(self.interval) + 1) * size

        def too_many() -> bool:
            if self.iterate_bytes is not None and needed() > self.iterate_bytes:
                return len(kept) > 1 + math.isqrt(self.interval)
            return self.auto and len(kept) > 2 * self.interval

        while too_many():
            self.interval *= 2
            # The oldest stays whatever its number: all steps are stepped through from it.
            drop = [r for r in kept[1:] if r.index % self.interval]
            for record in drop:
                self._release(record)
            kept = [record for record in kept if record.has_iterate]
        if self.iterate_bytes is not None and needed() > self.iterate_bytes:
            raise TrajectoryTooLong(
                f"{len(self)} inner steps are recorded since the last outer step. Keeping "
                f"{len(kept)} iterates and stepping through the {self.interval} steps between "
                f"them again needs {needed() / 2**20:,.1f} MiB (an iterate is "
                f"{size / 2**20:,.2f} MiB), more than iterate_bytes = "
                f"{self.iterate_bytes / 2**20:,.1f} MiB. Take an outer step more often, "
                "differentiate fewer steps (window=), or raise iterate_bytes."
            )

    def _check_memory(self) -> None:
        """Refuse to record more than ``max_bytes``; say when to look again.

        Adding up takes as long as a step's whole record, so it is done when steps like those so
        far could exceed the limit, and after a quarter more at the latest.
        """
        if self.max_bytes is None:
            self.max_bytes = free_memory(self.records[-1]) // 2
        used = self.nbytes()
        if used > self.max_bytes:
            raise TrajectoryTooLong(
                f"{len(self)} inner steps are recorded since the last outer step, "
                f"{used / 2**20:,.1f} MiB in all ({used / len(self) / 2**20:,.2f} MiB a step; "
                f"limit max_record_bytes = {self.max_bytes / 2**20:,.1f} MiB). Take an outer "
                "step more often, differentiate fewer steps (window=), keep fewer iterates "
                "(checkpoint_every=, offload='cpu'), use an implicit estimator such as 'cg', "
                "train without recording (with optimizer.paused():), or raise "
                "max_record_bytes."
            )
        room = len(self) * (self.max_bytes - used) // max(used, 1)
        self._check_at = self.count + max(1, min(16 + len(self) // 4, room))

    def adopt(self, other: Window, follows: bool) -> None:
        """Take over another window's steps (the estimator changed in mid-window).

        Args:
            other: the window.
            follows: its tangents are those of the new estimator too.
        """
        self.records.extend(other.records)
        self.count, self.number = other.count, other.number
        self.tangents = other.tangents if follows else None
        if self.iterates and other.iterates:
            self.moved, self.versions = other.moved, other.versions
        if self.pool.device == other.pool.device:
            self.pool = other.pool

    def nbytes(self) -> int:
        """Bytes of recorded iterates, of batches kept by reference, and of kept graphs."""
        storages = {
            storage.data_ptr(): storage.nbytes()
            for record in self.records
            for call, _ in record.calls
            for tensor, _ in call.versions
            for storage in (tensor.untyped_storage(),)
        }
        graphs = sum(
            call.kept.saved.nbytes
            for record in self.records
            for call, _ in record.calls
            if call.kept is not None
        )
        return self.pool.allocated + sum(storages.values()) + graphs

    def clear(self, restart: bool = False) -> None:
        """Forget every step.

        Args:
            restart: a new trajectory begins, so tangents are dropped even if carried.
        """
        if restart or not self.carry:
            self.tangents = None
            self.moved = []
            self.versions.clear()
        elif self.tangents is not None:
            self.tangents.forget_mismatch()
        self.number += 1
        while self.records:
            self._release(self.records.popleft())
        self.count = self._check_at = 0
        self.interval = self.first_interval

    def _release(self, record: StepRecord) -> None:
        if not self.iterates:
            return
        for part in record.parts.values():
            self.pool.give_back(tensors_of(part.values or (), part.state or ()))
            part.values = part.state = None


def take_part(
    optimizer: torch.optim.Optimizer,
    pool: Pool | None,
    gradients: bool = False,
    scale: Tensor | None = None,
) -> Part:
    """Record what an optimizer's step is about to start from.

    Args:
        optimizer: the inner optimizer, just before its step.
        pool: where to copy parameters and state; None records neither.
        gradients: also copy the gradients.
        scale: a factor the gradients still carry (fused optimizers under a GradScaler).

    Returns:
        The part.
    """
    hyper = [
        {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key != "params"
        }
        for group in optimizer.param_groups
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    part = Part(
        hyper=hyper,
        groups=[i for i, g in enumerate(optimizer.param_groups) for _ in g["params"]],
        present=[parameter.grad is not None for parameter in parameters],
    )
    if pool is not None:
        part.values = pool.copy(parameters)
        part.versions = [parameter._version for parameter in parameters]
        part.state = copy_states([optimizer.state.get(p, {}) for p in parameters], pool)
    if gradients:
        part.gradient = [
            None
            if p.grad is None
            else p.grad.detach().clone()
            if scale is None
            else p.grad.detach() / scale
            for p in parameters
        ]
    return part


def copy_states(states: Sequence[dict[str, Any]], pool: Pool) -> list[dict[str, Any]]:
    """Copies of optimizer states, tensors in buffers of the pool; None entries dropped."""
    copies = []
    for state in states:
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        buffers = dict(zip(tensors, pool.copy(list(tensors.values())), strict=True))
        others = {k: v for k, v in state.items() if k not in tensors and v is not None}
        copies.append({**others, **buffers})
    return copies


def tensors_of(
    values: Sequence[Tensor], states: Sequence[dict[str, Any]]
) -> list[Tensor]:
    """Every tensor of an iterate."""
    return [
        *values,
        *(v for state in states for v in state.values() if isinstance(v, Tensor)),
    ]


def free_memory(record: StepRecord) -> int:
    """Free bytes on the device the inner parameters (else the batches) live on."""
    tensors = record.values() or [
        t for call, _ in record.calls for t, _ in call.versions
    ]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 16 * 2**30
