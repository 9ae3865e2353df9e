"""Small parts of hooks: cheap, weak, and aware of whose line a warning is about."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BilevelWarning, OuterOutsideLoss

if TYPE_CHECKING:
    from .bilevel import BilevelOptimizer
    from .recorder import Recorder

_LIBRARIES = (str(Path(__file__).parent.parent), str(Path(torch.__file__).parent))


def on_gradient(loss: Tensor, hook: Callable[[Tensor], None]) -> None:
    """``loss.register_hook(hook)`` without a handle to remove it by, for 15 µs less."""
    node = loss.grad_fn
    if node is None or loss._backward_hooks is not None:
        loss.register_hook(hook)
        return
    loss._backward_hooks = OrderedDict({0: hook})
    node._register_hook_dict(loss)  # type: ignore[attr-defined]


class AfterBackward:
    """Runs at the end of a backward; thaws also when the backward raised and it is dropped."""

    __slots__ = ("recorder",)

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def __call__(self) -> None:
        """Called by the engine when the backward is done."""
        self.recorder.after_backward()

    def __del__(self) -> None:
        if self.recorder.frozen:
            self.recorder.thaw()


def weak(method: Callable[..., Any]) -> Callable[..., Any]:
    """A hook for the user's tensors and optimizers.

    It does not keep the method's object alive, and ``torch.compile`` does not trace it.
    """
    reference = weakref.ref(method.__self__)  # type: ignore[attr-defined]
    function = method.__func__  # type: ignore[attr-defined]

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return disabled(*args)
        alive = reference()
        return None if alive is None else function(alive, *args)

    disabled = torch.compiler.disable(call)
    return call


def stand_last(handles: Sequence[Any]) -> None:
    """Let hooks run after all others, which may change what they are to see."""
    for handle in handles:
        hooks = handle.hooks_dict_ref()
        if hooks and handle.id in hooks and next(reversed(hooks)) != handle.id:
            hooks.move_to_end(handle.id)


def outside_loss(touched: Sequence[str], name: str) -> OuterOutsideLoss:
    """The error about outer variables that an inner backward reached."""
    return OuterOutsideLoss(
        f"The outer variable {', '.join(touched)} received a gradient in the "
        f"backward of {name!r}: it enters the training objective outside the registered "
        "loss, as in (x * loss).backward(). The hypergradient could not see that. Move the "
        "whole expression into the function registered with @optimizer.inner_loss."
    )


def number(weight: Tensor) -> Tensor | float:
    """A weight to keep: a number where reading it costs nothing.

    On the CPU a tensor of 4 bytes that outlives the step pins a hole in the heap.
    """
    return weight.item() if weight.is_cpu else weight.detach()


def users_frame() -> int:
    """The ``stacklevel`` of the caller's nearest frame outside this library and torch."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
        level += 1
    return level


# Which BilevelOptimizer watches an inner optimizer.
_owners: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[Any]] = (
    weakref.WeakKeyDictionary()
)


def take_over(owner: BilevelOptimizer) -> None:
    """One BilevelOptimizer watches an inner optimizer; re-run cells make another."""
    for optimizer in owner.inners:
        reference = _owners.get(optimizer)
        before = reference and reference()
        if before is not None and not before._recorder.removed:
            before.remove()
            warnings.warn(
                f"This {type(optimizer).__name__} was already wrapped by another "
                "BilevelOptimizer, which has been removed (as by its remove()) so that "
                "steps are not counted twice.",
                BilevelWarning,
                stacklevel=users_frame(),
            )
        _owners[optimizer] = weakref.ref(owner)


def origin(function: Any) -> Any:
    """What tells a function that was defined again from another of the same name."""
    name = getattr(function, "__qualname__", None)
    if name is None or "<lambda>" in name:
        return function
    owner = getattr(function, "__self__", None)
    return getattr(function, "__module__", None), name, id(owner)
