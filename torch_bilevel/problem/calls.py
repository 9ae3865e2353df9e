"""A call of a registered loss, remembered so that it can be made again elsewhere.

What is kept: the function, its arguments (containers copied, tensors by reference with their
version), the random state at entry, autocast, and the training flags of the modules.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentCarriesGraph, BatchChanged, InvalidLoss
from .modules import Flags
from .randomness import Randomness, capture

if TYPE_CHECKING:
    from .kept import KeptGraph
    from .problem import BilevelProblem

AutocastState = list[tuple[str, bool, Any]]  # device type, on, dtype


@dataclass(slots=True)
class Call:
    """One evaluation of a registered loss.

    Attributes:
        function: the user's function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        name: the function's name, for messages.
        versions: each tensor argument with its version when it was recorded.
        randomness: the generators' state at entry; None uses the present one.
        autocast: per device type, whether autocast was on and its dtype.
        flags: training flags of the known modules; None uses the present ones.
        buffers: buffer values at entry, kept where the trajectory is replayed.
        frozen: ids of the inner parameters that did not require grad.
        kept: the graphs of the user's own evaluation, where they are kept.
        is_map: the function is a fixed-point map, whose residual is what steps consume.
    """

    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    name: str
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    randomness: Randomness | None = None
    autocast: AutocastState = field(default_factory=list)
    flags: Flags | None = None
    buffers: list | None = None
    frozen: Set[int] = frozenset()
    kept: KeptGraph | None = None
    is_map: bool = False

    def check_unchanged(self) -> None:
        """Refuse to evaluate on a batch that was modified in place since.

        Raises:
            BatchChanged: a tensor argument has another version than when it was recorded.
        """
        for tensor, version in self.versions:
            if tensor._version != version:
                raise BatchChanged(
                    f"An argument of {self.name!r} (shape {tuple(tensor.shape)}, "
                    f"{tensor.dtype}) was changed in place after the loss was evaluated on it "
                    f"({tensor._version - version} in-place operations since). The "
                    "hypergradient would be that of another batch. Pass a copy (x.clone()) to "
                    "the loss, or do not write into the batch before the outer step."
                )

    def nbytes(self) -> int:
        """Bytes of the tensor arguments it keeps alive."""
        return sum(t.numel() * t.element_size() for t, _ in self.versions)


_requires_grad = attrgetter("requires_grad")
_is_on = itemgetter(1)
_NONE_FROZEN: Set[int] = frozenset()
_PLAIN = (bool, int, float, str, bytes)

WeightedCall = tuple[Call, Any]  # the call and the weight it was back-propagated with


def record(
    function: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    problem: BilevelProblem,
    keep_buffers: bool = False,
) -> Call:
    """Remember a call before it is made.

    On the path of every inner step, where a Python frame costs microseconds (the caches are cold
    after a matrix product): hence ``map`` over attributes and few helpers.

    Args:
        function: the user's loss.
        args: positional arguments.
        kwargs: keyword arguments.
        problem: knows parameters from data, the modules, and the devices in use.
        keep_buffers: also copy the modules' buffers.

    Returns:
        The call.

    Raises:
        ArgumentCarriesGraph: an argument was computed from something that requires grad.
    """
    name = getattr(function, "__name__", None) or type(function).__name__
    live = problem.live
    versions: list[tuple[Tensor, int]] = []
    kept = []
    for value in args:
        if type(value) is not Tensor or value.grad_fn is not None or id(value) in live:
            value = _keep(value, name, live, versions)
        elif not value.is_inference():  # in inference mode it cannot change
            versions.append((value, value._version))
        kept.append(value)
    if kwargs:
        kwargs = {k: _keep(v, name, live, versions) for k, v in kwargs.items()}
    buffers = None
    if keep_buffers:
        buffers = [(m, n, b.detach().clone()) for m, n, b in problem.modules.buffers()]
    autocasting = torch._C._is_any_autocast_enabled()  # type: ignore[attr-defined]
    tensors = problem.inner.tensors
    return Call(
        function,
        tuple(kept),
        kwargs,
        name,
        versions,
        capture(problem.devices),
        autocast_state(problem.device_types) if autocasting else problem.no_autocast,
        problem.modules.flags(),
        buffers,
        _NONE_FROZEN
        if all(map(_requires_grad, tensors))
        else {id(tensor) for tensor in tensors if not tensor.requires_grad},
    )


def _keep(
    value: Any, name: str, live: set[int], versions: list[tuple[Tensor, int]]
) -> Any:
    """Copy containers and arrays, keep tensors by reference and note their versions."""
    if isinstance(value, Tensor):
        if id(value) in live:
            return value
        if value.grad_fn is not None:
            raise ArgumentCarriesGraph(
                f"An argument of {name!r} (shape {tuple(value.shape)}) was computed outside "
                f"it and carries a graph ({value.grad_fn.name()}). The hypergradient would "
                "miss what lies before it. Compute it inside the registered loss, or pass "
                "it detached (.detach()) if it is a constant."
            )
        if not value.is_inference():  # it has no version and cannot change
            versions.append((value, value._version))
        return value
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.ndarray):
        return _kept_array(value, versions)
    if type(value) in (dict, list, tuple):
        return _rebuilt(value, lambda item: _keep(item, name, live, versions))
    versions += ((t, t._version) for t in _inside(value, set()) if id(t) not in live)
    return value


def _kept_array(value: np.ndarray, versions: list[tuple[Tensor, int]]) -> np.ndarray:
    """A copy, for an array has no version that would tell; one that is not written to as it is."""
    if not value.flags.writeable or isinstance(value, np.memmap):
        return value
    # counted by `nbytes`; it takes no memory itself
    stand_in = torch.empty(value.nbytes, dtype=torch.uint8, device="meta")
    versions.append((stand_in, stand_in._version))
    return value.copy()


def _inside(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors in containers that are kept as they are: nobody but their class can copy them."""
    if isinstance(value, Tensor):
        if not value.is_inference():
            yield value
        return
    if value is None or isinstance(value, _PLAIN) or id(value) in seen:
        return
    seen.add(id(value))
    items: Any = ()
    if isinstance(value, UserDict):
        items = value.data.values()
    elif isinstance(value, dict):
        items = dict.values(value)
    elif isinstance(value, (list, tuple)):
        items = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, f.name, None) for f in dataclasses.fields(value)]
    for item in items:
        yield from _inside(item, seen)


def fresh_containers(value: Any) -> Any:
    """A copy of nested containers, so that a callee may pop from what it is given."""
    return _rebuilt(value, fresh_containers)


def _rebuilt(value: Any, function: Callable[[Any], Any]) -> Any:
    """A plain container with the function of every item; anything else as it is."""
    kind = type(value)
    if kind is dict:
        return {key: function(item) for key, item in value.items()}
    if kind is list or kind is tuple:
        return kind([function(item) for item in value])
    return value


def autocast_state(device_types: Sequence[str]) -> AutocastState:
    """Per device type: is autocast on, and with which dtype."""
    return [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in device_types
    ]


@contextlib.contextmanager
def autocast(state: AutocastState) -> Iterator[None]:
    """A fresh autocast region in the given state, with an empty cache before and after."""
    # also where nothing is on: inside a disabled region of the caller's, one that the loss enters
    # by itself leaves what it cached
    torch.clear_autocast_cache()
    anything = torch._C._is_any_autocast_enabled()  # type: ignore[attr-defined]
    anything = anything or any(map(_is_on, state))
    try:
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in state if anything else ():
                # dtype is validated even when disabled, and float32 is not accepted.
                region = (
                    torch.autocast(kind, dtype=dtype)
                    if enabled
                    else torch.autocast(kind, enabled=False)
                )
                stack.enter_context(region)
            yield
    finally:
        torch.clear_autocast_cache()


def scalar(result: Any, name: str) -> Tensor:
    """The loss in what a registered function returned.

    A tensor, a tuple or list whose first item is one, or an object with ``.loss``.

    Raises:
        InvalidLoss: there is no real tensor of one element.
    """
    loss: Any = result
    if isinstance(loss, (tuple, list)) and loss:
        loss = loss[0]
    elif not isinstance(loss, Tensor):
        loss = getattr(loss, "loss", loss)
    if not isinstance(loss, Tensor):
        raise InvalidLoss(
            f"The registered loss {name!r} returned {type(loss).__name__!r}; return a scalar "
            "tensor, a tuple whose first item is one, or an object with a .loss attribute."
        )
    if loss.numel() != 1 or not loss.is_floating_point():
        raise InvalidLoss(
            f"The registered loss {name!r} returned a tensor of shape {tuple(loss.shape)} and "
            f"dtype {loss.dtype}; return one real number, for example with .mean()."
        )
    return loss


def residual(call: Call, result: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The residual y − Ψ(y, x) per inner parameter, from what a map returned.

    Raises:
        InvalidLoss: it is not one tensor of its shape for each inner parameter.
    """
    found = [result] if isinstance(result, Tensor) else list(result or ())
    shapes = [tuple(v.shape) if isinstance(v, Tensor) else type(v) for v in found]
    expected = [tuple(t.shape) for t in tensors]
    if shapes != expected:
        raise InvalidLoss(
            f"The fixed-point map {call.name!r} returned {shapes}; return the new value of every "
            f"inner parameter, in the order of the optimizer: tensors of shapes {expected}."
        )
    return [t - value for t, value in zip(tensors, found, strict=True)]


def with_loss(result: Any, loss: Tensor) -> Any:
    """What a registered function returned, its loss replaced; the rest detached."""
    if isinstance(result, Tensor):
        return loss
    if isinstance(result, (tuple, list)):
        rest = [v.detach() if isinstance(v, Tensor) else v for v in result[1:]]
        if hasattr(result, "_make"):  # a namedtuple
            return type(result)._make([loss, *rest])  # type: ignore[attr-defined]
        return type(result)([loss, *rest])
    fields = dataclasses.fields(result) if dataclasses.is_dataclass(result) else ()
    names = {*(f.name for f in fields), *getattr(result, "__dict__", ())}
    found = {name: getattr(result, name, None) for name in names}
    rest = {n: v.detach() for n, v in found.items() if isinstance(v, Tensor)}
    result = copy.copy(result)
    try:
        for name, value in {**rest, "loss": loss}.items():
            try:
                setattr(result, name, value)
            except AttributeError:  # frozen
                object.__setattr__(result, name, value)
    except AttributeError as error:
        raise InvalidLoss(
            f"A registered loss returned a {type(result).__name__} whose .loss cannot be set "
            f"({error}). Return a tensor, a tuple that begins with it, or an object with an "
            "attribute `loss`."
        ) from error
    return result


def by_frozen(
    calls: Sequence[WeightedCall],
) -> list[tuple[Set[int], list[WeightedCall]]]:
    """Calls together that had the same parameters frozen, which were constants to them."""
    found: dict[frozenset[int], list[WeightedCall]] = {}
    for call, weight in calls:
        found.setdefault(frozenset(call.frozen), []).append((call, weight))
    return list(found.items())
