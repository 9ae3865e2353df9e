"""How the functions of a user are evaluated: twice differentiable, with the same random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils import _pytree as pytree

from ..errors import BatchChanged, UnsupportedTransform
from ..problem import Randomness, autocast, autocast_state
from ..second_order import second_order
from .levels import batches, derivatives, plain


def refuse_inference_mode(owner: str) -> None:
    """Raise inside ``torch.inference_mode()``, where derivatives are zeros.

    Raises:
        UnsupportedTransform: it is on.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise UnsupportedTransform(
            f"{owner} was called inside torch.inference_mode(), where nothing can be "
            "differentiated, and it differentiates. Use torch.no_grad(), or put "
            "torch.inference_mode(False) around it."
        )


def evaluating() -> Any:
    """The region of `second_order`, for any model; a compiled program has none."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return second_order(weight_norm=True)  # what is inside a function cannot be seen


def accelerators(tensors: Sequence[Tensor]) -> list[torch.device]:
    """The devices whose generators a loss on these tensors may draw from."""
    devices = dict.fromkeys(t.device for t in tensors)
    return [d for d in devices if d.type not in ("cpu", "meta")]


def generators(devices: Sequence[torch.device]) -> Randomness:
    """The state of the generators, read outside the transforms, which would wrap it."""
    with temporarily_clear_interpreter_stack():
        return Randomness(devices)


@contextlib.contextmanager
def drawing(devices: Sequence[torch.device], randomness: Randomness) -> Iterator[None]:
    """Draw from a state; at exit the generators are as they were at entry."""
    before = generators(devices)
    with temporarily_clear_interpreter_stack():
        randomness.restore()
    try:
        yield
    finally:
        with temporarily_clear_interpreter_stack():
            before.restore()


class Conditions:
    """Evaluations of a function under the conditions of the first: random numbers and autocast.

    Args:
        tensors: what it is evaluated on.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.devices = accelerators(tensors)
        self.randomness: Randomness | None = None
        self.kinds = ["cpu", *dict.fromkeys(device.type for device in self.devices)]
        if not torch.compiler.is_compiling():
            self.autocast = autocast_state(self.kinds)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """The region of one evaluation."""
        if torch.compiler.is_compiling():
            yield
            return
        with contextlib.ExitStack() as stack:
            # a backward pass runs outside of the user's region
            if autocast_state(self.kinds) != self.autocast:
                stack.enter_context(autocast(self.autocast))
            if self.randomness is None:
                self.randomness = generators(self.devices)
            else:
                stack.enter_context(drawing(self.devices, self.randomness))
            yield


def on_constants(
    function: Callable[..., Any], tensors: Sequence[Tensor], owner: str
) -> tuple[list[Tensor], bool]:
    """What a function gives on plain constants in place of its arguments, and whether it drew.

    Whatever still carries a derivative or lanes, it has from elsewhere. No random numbers are used
    up.

    Returns:
        The tensors of its result; whether random numbers were drawn, of which lanes may be too.

    Raises:
        BatchChanged: it wrote into what it was given.
    """
    constants = [plain(tensor) for tensor in tensors]
    versions = [_writes(tensor) for tensor in constants]
    devices = accelerators(constants)
    with drawing(devices, generators(devices)), torch.enable_grad():
        before = _drawn_so_far(devices)
        leaves = pytree.tree_leaves(function(*constants))
        drawn = _drawn_so_far(devices) != before
    for tensor, version in zip(constants, versions, strict=True):
        if _writes(tensor) != version:
            raise BatchChanged(
                f"{owner} writes in place into one of its arguments (shape "
                f"{tuple(tensor.shape)}, {tensor.dtype}), which is now another one: every further "
                "evaluation, and a derivative needs several, would see other numbers. Write "
                "b = b - c instead of b -= c, or clone() first."
            )
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], drawn


def reaches_others(
    function: Callable[..., Any], tensors: Sequence[Tensor], owner: str
) -> bool | None:
    """Whether a function depends on a differentiated or batched tensor that is no argument.

    None where it has lanes, but drew random numbers, which may have them.
    """
    seen, drawn = on_constants(function, tensors, owner)
    if any(map(derivatives, seen)):
        return True
    lanes = any(map(batches, seen))
    return None if lanes and drawn else lanes


def _writes(tensor: Tensor) -> int:
    """How often a tensor was written to, where that is counted."""
    return 0 if tensor.is_inference() else tensor._version


def name_of(function: Any) -> str:
    """What a function is called, in messages."""
    return getattr(function, "__name__", type(function).__name__)


def _drawn_so_far(devices: Sequence[torch.device]) -> list[bytes]:
    """The states of torch's generators."""
    with temporarily_clear_interpreter_stack():
        others = [torch.get_device_module(d).get_rng_state(d) for d in devices]
        return [bytes(s.numpy()) for s in (torch.get_rng_state(), *others)]
