"""Traced products: one recorded program of plain operations for all points of the same shapes.

The double backward of a loss is recorded as a graph (``make_fx``); what does not depend on v runs
once per point, the rest once per product, without autograd's graph walk. With ``compile=True``
inductor fuses the rest; a compiled model itself has no double backward (AOTAutograd has none).

*Others*: tensors the loss reads besides its arguments: the live parameters, buffers, data sets.
They are inputs of the recorded program and are read anew at every point; whatever else the loss
reads is part of the recording. Numbers and flags that it can be seen to read (closures, globals,
attributes of modules) choose the recording; and the loss itself is evaluated once at every point,
and recorded again if the program gives another value.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._program import Program, number
from ..errors import CaptureFailed, RecordingWarning, UnknownName
from ..kernels.language import tf32
from ..ops import always_fused, foreseen
from ..problem import (
    NOTHING,
    BilevelProblem,
    Call,
    WeightedCall,
    gradients,
    pulled,
    reachable_numbers,
    scalar,
)
from .base import Products, Substitute, disagreement, refuse_maps
from .capture import CapturedProduct, failed, supported, uncompiled_functions
from .trace import product, record, split

PROGRAMS = 16  # kept; each holds a few graphs


@dataclass(frozen=True)
class Traced(Products):
    """Products from a recorded program, optionally compiled.

    Needs: a loss without control flow that depends on values of tensors, whose batches are tensors
    (in containers, if you like) of few different shapes: each shape is recorded anew. Costs: 0.1 to
    3 s to record, with ``compile=True`` 5 to 60 s once; then an evaluation of the loss and most
    of a forward and backward pass per point, and products without Python's and autograd's
    overhead.
    The first product of a recording is checked against double backward.

    Args:
        compile: fuse the product with inductor.
        cuda_graph: replay the product as a CUDA graph; None does so on CUDA.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.Traced(compile=True))
        'traced(compile=True)'
    """

    compile: bool = False
    cuda_graph: bool | None = None

    def __post_init__(self) -> None:
        for name in ("compile", "cuda_graph"):
            value = getattr(self, name)
            if not (
                isinstance(value, bool) or (value is None and name == "cuda_graph")
            ):
                raise UnknownName(f"Traced({name}={value!r}): write True or False.")

    name: ClassVar[str] = "traced"
    words: ClassVar[str] = (
        "a recorded program: what does not depend on v once per point, the rest per product"
    )

    def linearize(
        self, problem: BilevelProblem, calls: Sequence[WeightedCall]
    ) -> TracedPoint:
        """See `Products.linearize`.

        Raises:
            CaptureFailed: the loss cannot be recorded, or its recording disagrees.
        """
        refuse_maps(self, calls)
        with foreseen((), ()), always_fused():
            parts = [(*self._recorded(problem, call), weight) for call, weight in calls]
        return TracedPoint(problem, calls, parts)

    def _recorded(
        self, problem: BilevelProblem, call: Call
    ) -> tuple[Recording, Values]:
        """The program for a call, recorded if there is none yet, and its values at the point."""
        given = _flatten(problem, call)
        key = (self, *_key(problem, call, given))
        known = problem.recorded.pop(key, None)
        values = None if known is None else known.at(call, given.tensors)
        if known is None or values is None:
            known = Recording(problem, call, given, self)
            values = known.at(call, given.tensors)
            if values is None:
                raise CaptureFailed(
                    f"The recorded program of {call.name!r} gives another loss than the function "
                    "itself, right after it was recorded. Does it draw from a generator of its "
                    "own? Use products='double_backward'."
                )
            here = [(call, 1.0)]
            point = TracedPoint(problem, here, [(known, values, 1.0)])
            wrong = disagreement(problem, point, here)
            if wrong is not None:
                raise CaptureFailed(
                    f"The recorded program of {call.name!r} gives {wrong}. Use "
                    "products='double_backward'."
                )
        self._keep(problem, key, known)
        return known, values

    def _keep(self, problem: BilevelProblem, key: tuple, recording: Recording) -> None:
        """The programs used last are kept; many of one loss mean that something keeps changing."""
        problem.recorded[key] = recording
        programs = [k for k, r in problem.recorded.items() if isinstance(r, Recording)]
        if len(programs) > PROGRAMS:
            del problem.recorded[programs[0]]
            if not problem.recorded.get("warned"):
                problem.recorded["warned"] = True
                warnings.warn(
                    f"products='traced' recorded more than {PROGRAMS} programs, the last one of "
                    f"{recording.name!r}: recording takes seconds. Something changes all the "
                    "time: shapes of batches, a number among the arguments, an attribute or "
                    "global that the loss reads, or the function itself (a lambda made anew). "
                    "Pass numbers as tensors, or use products='double_backward'.",
                    RecordingWarning,
                    stacklevel=2,
                )


class Given(NamedTuple):
    """The arguments of a call, taken apart."""

    tensors: list[Tensor]  # data
    rest: list  # every leaf, with a mark where a tensor is to be put
    spec: Any  # the containers


def _flatten(problem: BilevelProblem, call: Call) -> Given:
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    tensors, rest = [], []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and id(leaf) not in problem.live:
            tensors.append(leaf)
            rest.append(_DATA)
        elif isinstance(leaf, Tensor) or leaf is None or isinstance(leaf, _PLAIN):
            rest.append(leaf)
        else:
            raise CaptureFailed(
                f"{call.name!r} was called with a {type(leaf).__name__}, which cannot be looked "
                "into. Pass its tensors, in tuples, lists or dicts, or use "
                "products='double_backward'."
            )
    return Given(tensors, rest, spec)


_DATA = object()  # stands where a tensor is to be put
_PLAIN = (bool, int, float, str, torch.dtype, torch.device)


def _key(problem: BilevelProblem, call: Call, given: Given) -> tuple:
    tensors, rest, spec = given
    metadata = tuple(
        (t.shape, t.dtype, t.device, t.stride(), t.requires_grad) for t in tensors
    )
    plain = tuple(
        id(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in rest
    )
    flags = problem.modules.flags() if call.flags is None else call.flags
    return (
        id(call.function),  # the recording keeps the function alive
        metadata,
        plain,
        str(spec),
        tuple((id(module), flag) for module, flag in flags),
        reachable_numbers(call.function, problem.modules.members.values()),
        str(call.autocast),
        frozenset(call.frozen),
        tf32(),
    )


@dataclass
class Values:
    """What the product needs of a point."""

    kept: list[Tensor]


class Recording:
    """The program of one loss for arguments of one kind.

    Args:
        problem: the problem.
        call: an example.
        given: its arguments.
        options: the engine.
    """

    def __init__(
        self, problem: BilevelProblem, call: Call, given: Given, options: Traced
    ):
        self.problem, self.options, self.name = problem, options, call.name
        self.function = call.function
        self.reached = [False] * len(problem.outer.tensors)
        v = problem.inner.layout.zeros()
        with problem.evaluating(call):
            # buffers are copies in here: which tensor is which buffer
            places = {id(b): (m, n) for m, n, b in problem.modules.buffers()}
            try:
                with uncompiled_functions():
                    module, others = record(
                        self._program(call, given), [v, *given.tensors]
                    )
            except Exception as error:
                raise failed(call.name, error) from error
        self.others = [places.get(id(tensor), tensor) for tensor in others]
        self.prefix, self.kept, self.order = split(module, 0, [0])
        self.module = module
        self._products: dict[tuple[bool, bool], Callable[..., Any]] = {}
        self._captured: dict[tuple[bool, bool], CapturedProduct] = {}
        self.graphs: dict[Any, Any] = {}  # of whole solves
        self.nbytes = 0

    def _program(self, call: Call, given: Given) -> Callable[..., Any]:
        problem, (_, rest, spec) = self.problem, given

        def run(v: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            """(loss, H v, J v) of a call on these arguments; not ∇_y g, which costs more."""
            data = iter(tensors)
            leaves = [next(data) if leaf is _DATA else leaf for leaf in rest]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            here = Call(call.function, args, kwargs, call.name, autocast=call.autocast)
            loss = scalar(problem.run(here), call.name)
            inner, outer = problem.inner, problem.outer
            (parts,) = gradients(
                loss, torch.ones_like(loss), inner.tensors, create_graph=True
            )
            H, J = pulled(parts, inner.layout.split(v), inner.tensors, problem.direct)
            self.reached = [part is not None for part in J]
            return (
                loss.detach().clone(),
                inner.layout.flatten(H),
                outer.layout.flatten(J),
            )

        return run

    def at(self, call: Call, tensors: Sequence[Tensor]) -> Values | None:
        """Run the prefix at the present point; None if the loss itself gives another value."""
        problem = self.problem
        v = problem.inner.layout.zeros()
        with problem.evaluating(call):  # with grad: it may differentiate by itself
            loss = problem.value(call).detach()
        with problem.evaluating(call), torch.no_grad():
            buffers = {(m, n): b for m, n, b in problem.modules.buffers()}
            others = [
                buffers[other] if isinstance(other, tuple) else other.detach()
                for other in self.others
            ]
            try:
                found, *kept = self.prefix(v, *tensors, *others)
            except (RuntimeError, IndexError):  # of shapes that depend on values
                return None
        size = loss.abs().clamp_min(torch.finfo(loss.dtype).tiny)
        if not bool(
            (found - loss).abs() <= 256 * torch.finfo(loss.dtype).eps * size
        ) and bool(torch.isfinite(loss)):
            return None
        own = {_address(t) for t in problem.inner.tensors + problem.outer.tensors}
        # numbers on the host would be part of a captured graph
        kept = [t.to(v.device) if t.dim() == 0 else t for t in kept]
        kept = [t.clone() if _address(t) in own else t.detach() for t in kept]
        self.nbytes = sum(t.numel() * t.element_size() for t in kept)
        return Values(kept)

    def size(self) -> tuple[int, int]:
        """Operations in a joint product, and bytes kept of a point."""
        graph = product(self.module, self.kept, self.order, [1, 2]).graph
        return sum(node.op == "call_function" for node in graph.nodes), self.nbytes

    def product(self, inner: bool, outer: bool) -> Callable[..., Any]:
        """v, *values ↦ (H v,) if ``inner``, (J v,) if ``outer``, or both."""
        run = self._products.get((inner, outer))
        if run is None:
            numbers = [k for k, want in ((1, inner), (2, outer)) if want]
            module = product(self.module, self.kept, self.order, numbers)
            run = module.forward  # a module's call costs as much as two operations
            if self.options.compile:
                run = torch.compile(module, fullgraph=True, dynamic=False)
            self._products[inner, outer] = run
        return run

    def apply(
        self, values: Values, v: Tensor, inner: bool, outer: bool
    ) -> tuple[Tensor, ...]:
        """H v if ``inner``, J v if ``outer``."""
        run = self.product(inner, outer)
        v = v.detach() if v.requires_grad else v  # values have no graph
        if not supported(self.options.cuda_graph, v.device):
            try:
                return run(v, *values.kept)
            except RuntimeError as error:
                raise failed(self.name, error) from error
        wanted = inner, outer
        with torch.no_grad():
            if wanted not in self._captured:
                self._captured[wanted] = CapturedProduct(run, v, values.kept)
            return self._captured[wanted](v, values, values.kept)


def _address(tensor: Tensor) -> int | None:
    strided = tensor.layout == torch.strided
    return tensor.untyped_storage().data_ptr() if strided else None


class TracedPoint(Substitute):
    """Products from recordings, one for each call."""

    def __init__(
        self,
        problem: BilevelProblem,
        calls: Sequence[WeightedCall],
        parts: Sequence[tuple[Recording, Values, Any]],
    ):
        super().__init__(problem, calls)
        self.parts = parts

    def product(self, v: Tensor, inner: bool, outer: bool) -> tuple[Tensor, Tensor]:
        """See `Point.product`."""
        total: Sequence[Tensor] = []
        for recording, values, weight in self.parts:
            found: Sequence[Tensor] = recording.apply(values, v, inner, outer)
            if not isinstance(weight, float) or weight != 1:
                found = [part * weight for part in found]
            total = list(map(torch.add, total, found)) if total else found
            if outer:
                self.reached = [
                    a or b for a, b in zip(self.reached, recording.reached, strict=True)
                ]
        return total[0] if inner else NOTHING, total[-1] if outer else NOTHING

    def program(self) -> Program | None:
        """See `Point.program`: where products may be replayed as CUDA graphs."""
        layout = self.problem.inner.layout
        options = [recording.options for recording, _, _ in self.parts]
        if not all(supported(option.cuda_graph, layout.device) for option in options):
            return None
        runs = [recording.product(True, False) for recording, _, _ in self.parts]
        counts = [len(values.kept) for _, values, _ in self.parts]
        plain = tuple(isinstance(w, float) and w == 1 for _, _, w in self.parts)

        def run(v: Tensor, *inputs: Tensor) -> Tensor:
            rest = iter(inputs)
            terms = []
            for apply, count, is_one in zip(runs, counts, plain, strict=True):
                (Hv,) = apply(v, *itertools.islice(rest, count))
                terms.append(Hv if is_one else Hv * next(rest))
            return functools.reduce(torch.add, terms)

        inputs = []
        for (_, values, weight), is_one in zip(self.parts, plain, strict=True):
            inputs += values.kept
            if not is_one:
                inputs.append(number(weight, layout.dtype, layout.device))
        recordings = tuple(recording for recording, _, _ in self.parts)
        graphs = recordings[0].graphs
        return Program((recordings, plain), run, inputs, graphs, self._launched)

    def _launched(self, count: int) -> None:
        self.problem.num_products += count
