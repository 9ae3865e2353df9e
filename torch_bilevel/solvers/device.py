"""Iterations that the host does not wait for: steps launched ahead, or replayed as CUDA graphs.

An iteration is a state on the device and a step; ``A`` applied to the state's direction comes
between. Whether it goes on is a flag, copied to the host without waiting and looked at one look
later. Where the operator says that it is a fixed program (see `Program`), whole blocks of steps,
products included, are captured once as a CUDA graph and replayed for every later system.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._program import Program
from ..errors import CaptureFailed
from ..kernels.language import unavailable
from .base import Operator
from .loops import may_look

BLOCK = 4  # steps between looks at the flag; even, because states alternate between two halves
KEPT = 8  # captured iterations of a program
S = TypeVar("S", bound=Any)
Step = Callable[[S, Tensor, int], S]


def on_host(vector: Tensor) -> bool:
    """Whether numbers can be read at no cost."""
    return vector.device.type == "cpu"


def by_kernels(vector: Tensor) -> bool:
    """Whether steps on a vector are kernels: on a device for which there are any."""
    return not on_host(vector) and may_look() and unavailable(vector) is None


class Watch:
    """Reads flags one look late, so that the device always has work."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, Any] | None = None

    def stopped(self, going: Tensor) -> bool:
        """Whether the iteration had stopped at the look before this one (on the CPU: at this one).

        Args:
            going: 0-d, not zero while it goes on.
        """
        if going.device.type != "cuda":
            return not bool(going)
        before = self.last
        copy = torch.empty((), dtype=going.dtype, pin_memory=True)
        copy.copy_(going, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(going.device))
        self.last = copy, event
        if before is None:
            return False
        before[1].synchronize()
        return not bool(before[0])


def advance(
    operator: Operator,
    state: S,
    step: Step[S],
    num_steps: int,
    early: bool,
    key: Hashable = None,
) -> tuple[S, int]:
    """Take steps until the iteration stops or ``num_steps`` are taken.

    Args:
        operator: A.
        state: before the first step; has a ``direction``, and ``going(steps)``.
        step: of (state, A direction, number) makes the next state.
        num_steps: at most so many.
        early: look at the flag; otherwise all steps are taken.
        key: what, besides the operator, the step's meaning depends on.

    Returns:
        The state after the last step, and how many were taken.
    """
    kernels = by_kernels(state.direction)  # which move their state, as graphs need it
    program = operator.program() if kernels and operator.program else None
    if program is not None and num_steps:
        whole = type(state), key, num_steps, early
        return _replayed(operator, program, state, step, whole)
    watch = Watch()
    for k in range(num_steps):
        if early and watch.stopped(state.going(k)):
            return state, k
        state = step(state, operator(state.direction).contiguous(), k)
    return state, num_steps


@dataclass
class Captured:
    """An iteration in buffers of its own, and graphs of blocks of its steps.

    Attributes:
        state: where the graphs read and write.
        inputs: of the operator, likewise.
        graphs: one for each block.
        sizes: how many steps each takes.
    """

    state: Any
    inputs: list[Tensor]
    graphs: list[Any]
    sizes: list[int]


def _replayed(
    operator: Operator,
    program: Program,
    state: S,
    step: Step[S],
    how: tuple[Any, Hashable, int, bool],
) -> tuple[S, int]:
    v, (*_, num_steps, early) = state.direction, how
    whole = program.key, how, v.dtype, len(v)
    found = program.graphs.pop(whole, None)
    if found is None:
        found = _captured(program, state, step, num_steps, early)
    program.graphs[whole] = found
    if len(program.graphs) > KEPT:
        del program.graphs[next(iter(program.graphs))]
    copy_all(found.inputs, program.inputs)
    _copy(found.state, state)
    watch, taken = Watch(), 0
    for graph, size in zip(found.graphs, found.sizes, strict=True):
        if early and watch.stopped(found.state.going(taken)):
            break
        graph.replay()
        taken += size
        operator.num_products += size
        program.launched(size)
    # the next system overwrites these buffers
    return _copied(found.state), taken


def _captured(
    program: Program, state: S, step: Step[S], num_steps: int, early: bool
) -> Captured:
    """Capture all steps as one graph, or, to stop early, as graphs of a few steps each."""
    own = _copied(state)
    inputs = [t.clone() for t in program.inputs]
    size = BLOCK if early else num_steps
    starts = list(range(0, num_steps, size))

    def block(first: int) -> Callable[[], None]:
        def run() -> None:
            for k in range(first, min(first + size, num_steps)):
                step(own, program.run(own.direction, *inputs).contiguous(), k)

        return run

    made: dict[tuple[int, bool], Any] = {}
    graphs, sizes = [], []
    for first in starts:
        last = min(first + size, num_steps)
        # blocks are alike, but for the first step of all and the number of steps
        alike = last - first, first == 0
        if alike not in made:
            made[alike] = capture(block(first), own.direction.device, "solve")
        graphs.append(made[alike])
        sizes.append(last - first)
    return Captured(own, inputs, graphs, sizes)


def _copied(state: S) -> S:
    return type(state)(*(t.clone() if isinstance(t, Tensor) else t for t in state))


def _copy(into: Any, state: Any) -> None:
    both = zip(into, state, strict=True)
    pairs = [(own, given) for own, given in both if isinstance(own, Tensor)]
    copy_all([own for own, _ in pairs], [given for _, given in pairs])


def copy_all(into: list[Tensor], given: list[Tensor]) -> None:
    """Overwrite tensors, in a few launches."""
    if into:
        torch._foreach_copy_(into, given)


def capture(run: Callable[[], None], device: torch.device, what: str) -> Any:
    """A CUDA graph of what a function launches; it writes into memory that stays.

    Args:
        run: the function; called once before, so that libraries and kernels are ready.
        device: a CUDA device.
        what: a word for it, in messages.

    Raises:
        CaptureFailed: it does something that CUDA does not let be captured.
    """
    try:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # other threads (a loader that pins memory) may go on
            mode = "thread_local"
            with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
                run()
    except RuntimeError as error:
        raise CaptureFailed(
            f"The {what} could not be captured as a CUDA graph: {error} Write "
            "products='traced(cuda_graph=False)'."
        ) from error
    return graph
