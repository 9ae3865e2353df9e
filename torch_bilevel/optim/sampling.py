"""Independent inner batches, from the data of the registered losses or from the window.

A stochastic estimator needs batches besides those the loop used. An inner loss that was registered
with ``data=`` gives new ones; for one without, recorded steps are drawn again, uniformly with
replacement, which makes the estimate unbiased for the window's mean objective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BilevelError
from ..problem import Batches, Randomness, Sample, Ticket, preserved, record

if TYPE_CHECKING:
    from ..inner import StepRecord
    from ..problem import Call, WeightedCall
    from .bilevel import BilevelOptimizer

PASTE = (
    "batches = tb.Batches((x, y), batch_size=64), register the loss with data=batches, and "
    "iterate over it: for x, y in batches"
)


class Sampler:
    """Draws samples of the inner objective for estimators.

    Args:
        owner: has the losses, the window and the problem.
    """

    def __init__(self, owner: BilevelOptimizer):
        self._owner = owner
        self._generator: torch.Generator | None = None
        self._masks: Randomness | None = None  # the stream of dropout masks

    def ticket(self, step: StepRecord | None = None, full: bool = False) -> Ticket:
        """A new ticket: nothing is drawn yet.

        Args:
            step: samples have its losses and weights; None takes the last recorded step.
            full: every sample is the mean over all data, or over the window.
        """
        if self._generator is None:
            # seeded from the program's generator, which does not move
            with preserved():
                seed = int(torch.randint(2**62, ()))
            self._generator = torch.Generator().manual_seed(seed)
        window = self._owner._recorder.window.steps()
        like = window[-1] if step is None else step
        if not full:
            return Ticket(lambda n: self._samples(like, window, n), self._generator)
        return Ticket(lambda _: [self._everything(like, window)], self._generator)

    def outer(self, calls: Sequence[WeightedCall]) -> Sequence[WeightedCall]:
        """The outer calls of a full pass over their `Batches`, or these where there are none."""
        found: list[WeightedCall] = []
        for call, weight in calls:
            loss = _of(self._owner.outer_losses, call)
            batches = loss.data.source if loss and loss.data else None
            if isinstance(batches, Batches):
                found += [
                    (replace(call, args=batches[k], versions=[]), weight / len(batches))
                    for k in range(len(batches))
                ]
            else:
                found.append((call, weight))
        return found

    @property
    def note(self) -> str:
        """What a report says about where samples come from."""
        losses = self._owner.inner_losses.values()
        lacking = [loss.name for loss in losses if loss.data is None]
        if not lacking:
            return ""
        return (
            f"inner batches drawn from the window (no data= for {', '.join(lacking)})"
        )

    def number(self, call: Call) -> tuple[int, int]:
        """The number of the batch a call was made on, and how many there are.

        Raises:
            BilevelError: it does not come from `Batches` that its loss was registered with.
        """
        owner = self._owner
        loss = _of(owner.inner_losses, call) or _of(owner.outer_losses, call)
        source = loss.data if loss else None
        batches = source.source if source else None
        if isinstance(batches, Batches):
            found = batches.number((*call.args, *call.kwargs.values()))
            if found is not None:
                return found, len(batches)
        elif source is not None and source.batches == "all":
            return 0, 1  # the same batches every time
        elif not call.args and not call.kwargs:
            return 0, 1  # a loss without arguments has one batch
        what = (
            "its arguments are not tensors that these Batches handed out"
            if isinstance(batches, Batches)
            else f"its data is {type(batches).__name__ if source else 'not known'}"
        )
        raise BilevelError(
            f"A SAGA table has a row for every batch, and which batch {call.name!r} was called on "
            f"cannot be told: {what}. Use numbered batches: {PASTE}."
        )

    def _samples(
        self, like: StepRecord, window: Sequence[StepRecord], count: int | None
    ) -> list[Sample]:
        """Independent samples; None takes as many as the window has steps."""
        losses = self._owner.inner_losses
        total = _weights(like)
        lacking = [f for f, call in total.items() if not _has_data(losses, call[0])]
        steps = list(window) or [like]
        number = len(steps) if count is None else count
        picks = list(range(len(steps)))
        if lacking and count is not None:
            picks = torch.randint(
                len(steps), (count,), generator=self._generator
            ).tolist()
        samples: list[Sample] = []
        for index in range(number):
            calls: Sample = []
            for function, (call, weight) in total.items():
                if function in lacking:
                    recorded = steps[picks[index]].calls
                    calls += [item for item in recorded if item[0].function is function]
                else:
                    calls.append((self._fresh(call), weight))
            samples.append(calls)
        return samples

    def _everything(self, like: StepRecord, window: Sequence[StepRecord]) -> Sample:
        """The mean over all data of each loss, or over the window where it has none."""
        calls: Sample = []
        for function, (call, weight) in _weights(like).items():
            loss = _of(self._owner.inner_losses, call)
            batches = loss.data.source if loss and loss.data else None
            if isinstance(batches, Batches):
                count = len(batches)
                calls += [
                    (self._fresh(call, batches[k]), weight / count)
                    for k in range(count)
                ]
            else:
                steps = list(window) or [like]
                calls += [
                    (known, w / len(steps))
                    for step in steps
                    for known, w in step.calls
                    if known.function is function
                ]
        return calls

    def _fresh(self, like: Call, batch: tuple | None = None) -> Call:
        """A call of an inner loss on a new batch, with a dropout mask of its own."""
        problem, loss = self._owner.problem, _of(self._owner.inner_losses, like)
        if batch is None:
            batch = loss.data.draw(problem.inner.layout.device, 1)[0]
        assert batch is not None
        with preserved(problem.devices):
            if self._masks is not None:
                self._masks.restore()
            torch.rand(())  # every call starts at another place of the stream
            for device in problem.devices:
                torch.rand((), device=device)
            call = record(loss.function, batch, {}, problem)
            call.is_map = like.is_map
            self._masks = Randomness(problem.devices)
        call.autocast, call.flags = like.autocast, like.flags
        return call

    def state_dict(self) -> dict[str, Any]:
        """The random streams."""
        return {
            "generator": self._generator and self._generator.get_state(),
            "masks": self._masks and self._masks.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to saved streams."""
        self._generator = None
        if state["generator"] is not None:
            self._generator = torch.Generator()
            self._generator.set_state(state["generator"])
        masks = state["masks"]
        self._masks = None if masks is None else Randomness.from_state_dict(masks)


def _of(losses: Mapping[str, Any], call: Call) -> Any:
    """The registered loss a call was of."""
    found = (loss for loss in losses.values() if loss.function is call.function)
    return next(found, None)


def _has_data(losses: Mapping[str, Any], call: Call) -> bool:
    loss = _of(losses, call)
    return loss is not None and loss.data is not None


def _weights(step: StepRecord) -> dict[Any, tuple[Call, Any]]:
    """Per loss, a call of a step and the weight of all its calls together."""
    total: dict[Any, tuple[Call, Any]] = {}
    for call, weight in step.calls:
        known = total.get(call.function)
        total[call.function] = (call, weight if known is None else known[1] + weight)
    return total
