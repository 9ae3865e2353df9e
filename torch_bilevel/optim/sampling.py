"""Independent inner batches, from the data of the registered losses or from the window.

A stochastic estimator needs batches besides those the loop used. An inner loss that was registered
with ``data=`` gives new ones; for one without, recorded steps are drawn again, uniformly with
replacement, which makes the estimate unbiased for the window's mean objective.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from ..errors import BilevelError
from ..problem import Randomness, Sample, Ticket, preserved, record

if TYPE_CHECKING:
    from ..inner import StepRecord
    from ..problem import Call, WeightedCall
    from .bilevel import BilevelOptimizer

PASTE = (
    "Use numbered batches: batches = tb.Batches((x, y), batch_size=64), register the loss with "
    "data=batches, and iterate over it: for x, y in batches"
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
            step: the one to go by before any is recorded; full passes have its losses and
                weights. None takes the last recorded step.
            full: every sample is the mean over all data.
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
        return Ticket(lambda _: [self._everything(like)], self._generator)

    def outer(self, calls: Sequence[WeightedCall]) -> Sequence[WeightedCall]:
        """The outer calls of a full pass over their data, or these where none was registered.

        Raises:
            BilevelError: data was registered that cannot be passed over.
        """
        found: list[WeightedCall] = []
        for call, weight in _weights(calls).values():
            loss = _of(self._owner.outer_losses, call)
            if loss is None or loss.data is None:
                own = [item for item in calls if item[0].function is call.function]
                found += own
                continue
            batches = self._all(loss)
            for batch in batches:
                args, kwargs = _arguments(call, batch, self._owner.problem.live)
                again = replace(call, args=args, kwargs=kwargs, versions=[])
                found.append((again, weight / len(batches)))
        return found

    def _all(self, loss: Any) -> list[tuple]:
        """Every batch of a loss's data.

        Raises:
            BilevelError: it cannot be passed over.
        """
        data = loss.data
        device = self._owner.problem.inner.layout.device
        batches = None if data is None else data.everything(device)
        if batches is None:
            what = "none" if data is None else type(data.source).__name__
            raise BilevelError(
                f"{self._owner.estimator} takes a pass over all data now and then, and the data of "
                f"{loss.name!r} cannot be passed over (data={what}). {PASTE}."
            )
        return batches

    @property
    def fresh(self) -> bool:
        """Whether every inner loss was registered with data to draw samples from."""
        losses = self._owner.inner_losses.values()
        return all(loss.data is not None for loss in losses)

    @property
    def note(self) -> str:
        """What a report says about where samples come from."""
        losses = self._owner.inner_losses.values()
        lacking = [loss.name for loss in losses if loss.data is None]
        if lacking:
            names = ", ".join(lacking)
            return f"inner batches drawn from the window (no data= for {names})"
        in_order = [loss.name for loss in losses if loss.data and loss.data.in_order]
        if in_order:
            return (
                f"inner batches are consecutive ones of an epoch ({', '.join(in_order)}), which "
                "are not independent; those of tb.Batches are"
            )
        return ""

    def number(self, call: Call) -> tuple[int, int]:
        """The number of the batch a call was made on, and how many there are.

        Raises:
            BilevelError: it does not come from `Batches` that its loss was registered with.
        """
        owner = self._owner
        loss = _of(owner.inner_losses, call) or _of(owner.outer_losses, call)
        source = loss.data if loss else None
        known, batches = (source.source, source.numbered) if source else (None, None)
        one = isinstance(known, (list, tuple)) and len(known) == 1
        if source is not None and (source.batches == "all" or one):
            return 0, 1  # the same batches every time
        elif batches is not None:
            found = batches.number((*call.args, *call.kwargs.values()))
            if found is not None:
                return found, len(batches)
        elif not call.args and not call.kwargs:
            return 0, 1  # a loss without arguments has one batch
        what = (
            "its arguments are not tensors that these Batches handed out"
            if batches is not None
            else f"its data is {type(known).__name__ if source else 'not known'}"
        )
        raise BilevelError(
            f"A SAGA table has a row for every batch, and which batch {call.name!r} was called on "
            f"cannot be told: {what}. {PASTE}. Batches(..., device=...) moves them and still knows "
            "them."
        )

    def _samples(
        self, like: StepRecord, window: Sequence[StepRecord], count: int | None
    ) -> list[Sample]:
        """Independent samples; None takes as many as the window has steps."""
        steps = list(window) or [like]
        picks: Sequence[int] = range(len(steps))
        if count is not None:
            # which losses a step is made of may differ from step to step
            known = self._generator
            picks = torch.randint(len(steps), (count,), generator=known).tolist()
        return [self._sample(steps[pick]) for pick in picks]

    def _sample(self, step: StepRecord) -> Sample:
        """A step's losses on new batches; on its own where there is no data to draw from."""
        calls: Sample = []
        for function, (call, weight) in _weights(step.calls).items():
            loss = _of(self._owner.inner_losses, call)
            if loss is None or loss.data is None:
                calls += [item for item in step.calls if item[0].function is function]
            else:
                calls.append((self._fresh(call), weight))
        return calls

    def _everything(self, step: StepRecord) -> Sample:
        """The mean over all data of each loss of a step.

        Raises:
            BilevelError: a loss with arguments has no data that can be passed over.
        """
        calls: Sample = []
        for call, weight in _weights(step.calls).values():
            loss = _of(self._owner.inner_losses, call)
            if loss.data is None and not call.args and not call.kwargs:
                calls.append((call, weight))  # without arguments it is all there is
                continue
            batches = self._all(loss)
            calls += [
                (self._fresh(call, batch), weight / len(batches)) for batch in batches
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
            args, kwargs = _arguments(like, batch, problem.live)
            call = record(loss.function, args, kwargs, problem)
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


def _arguments(
    like: Call, batch: tuple, live: Set[int]
) -> tuple[tuple, dict[str, Any]]:
    """A new batch in the place of that of a call, whose other arguments stay.

    Args:
        like: the call.
        batch: positional arguments.
        live: ids of the variables, which belong to no batch.

    Raises:
        BilevelError: one of those is a tensor, which probably belongs to the batch of the call.
    """
    try:
        names = list(inspect.signature(like.function).parameters)[: len(batch)]
    except (TypeError, ValueError):  # of a builtin
        names = []
    rest = like.args[len(batch) :]
    kwargs = {name: v for name, v in like.kwargs.items() if name not in names}
    for value in pytree.tree_leaves((rest, kwargs)):
        if isinstance(value, torch.Tensor) and value.dim() and id(value) not in live:
            raise BilevelError(
                f"{like.name!r} was called with more than the {len(batch)} argument(s) its data= "
                f"gives: a tensor of shape {tuple(value.shape)}, which belongs to the batch of "
                "that call, perhaps. Let data= give everything that changes from batch to batch, "
                "and let the function read constants from outside its arguments."
            )
    return (*batch, *rest), kwargs


def _weights(calls: Sequence[WeightedCall]) -> dict[Any, tuple[Call, Any]]:
    """Per loss, one of its calls and the weight of all of them together."""
    total: dict[Any, tuple[Call, Any]] = {}
    for call, weight in calls:
        known = total.get(call.function)
        total[call.function] = (call, weight if known is None else known[1] + weight)
    return total
