"""What the transforms of ``torch.func`` around a call do to the tensors it is given.

Every transform is a level; under ``jacfwd(grad(f))`` the argument of f is a tensor of level grad
that wraps one of level jvp (itself under the vmap that ``jacfwd`` is made of).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.pyfunctorch import (
    temporarily_clear_interpreter_stack,
    temporarily_pop_interpreter_stack,
)
from torch.autograd import forward_ad

from ..errors import ForwardOverForward, UnsupportedParameter
from ..solvers import differentiated

_DEAD = -2  # the level of what is left of a transform that has returned


def derivatives(tensor: Tensor) -> set[tuple[int, str]]:
    """What differentiates through a tensor.

    Args:
        tensor: any tensor.

    Returns:
        (level, "Grad" or "Jvp"); level 0 is autograd itself, the others are transforms.

    Example:
        >>> import torch
        >>> from torch_bilevel.func.levels import derivatives
        >>> derivatives(torch.ones(2, requires_grad=True))
        {(0, 'Grad')}
    """
    stack = _functorch.get_interpreter_stack() or []
    level = stack[-1].level() if stack else 0
    while _level(tensor) == _DEAD or _level(tensor) > level:  # of one that is over
        tensor = _functorch.get_unwrapped(tensor)
    if not stack:
        return _at_this_level(tensor, 0)
    found = set()
    if _level(tensor) == level:
        if _functorch.is_gradtrackingtensor(tensor):
            found = _at_this_level(tensor, level)
        tensor = _functorch.get_unwrapped(tensor)
    # only at its own level does a tensor show its tangent
    with temporarily_pop_interpreter_stack():
        return found | derivatives(tensor)


def _level(tensor: Tensor) -> int:
    wrapped = _functorch.is_functorch_wrapped_tensor(tensor)
    return _functorch.maybe_get_level(tensor) if wrapped else 0


def _at_this_level(tensor: Tensor, level: int) -> set[tuple[int, str]]:
    found = set()
    if tensor.requires_grad:
        found.add((level, "Grad"))
    differentiable = tensor.is_floating_point() or tensor.is_complex()
    if differentiable and forward_ad.unpack_dual(tensor).tangent is not None:
        found.add((level, "Jvp"))
    return found


def batches(tensor: Tensor) -> set[int]:
    """The levels of ``vmap`` at which a tensor is batched."""
    found = set()
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            found.add(_functorch.maybe_get_level(tensor))
        tensor = _functorch.get_unwrapped(tensor)
    return found


def plain(tensor: Tensor) -> Tensor:
    """The first lane of a tensor, a constant that no transform knows of."""
    if not _functorch.is_functorch_wrapped_tensor(tensor):
        with temporarily_clear_interpreter_stack():
            return tensor.detach()
    lanes = plain(_functorch.get_unwrapped(tensor))
    if not _functorch.is_batchedtensor(tensor):
        return lanes
    with temporarily_clear_interpreter_stack():
        return lanes.select(_functorch.maybe_get_bdim(tensor), 0)


def surroundings() -> tuple[str, ...]:
    """The kinds of the transforms that are active, outermost first."""
    stack = _functorch.get_interpreter_stack() or []
    return tuple(str(level.key()) for level in stack)


def every(tensor: Tensor) -> Tensor:
    """All lanes of a tensor, a constant that no transform knows of."""
    with temporarily_clear_interpreter_stack():
        return _unwrapped(tensor).detach()


def lanes() -> set[int]:
    """The levels of ``vmap`` that are active."""
    stack = _functorch.get_interpreter_stack() or []
    kind = _functorch.TransformType.Vmap
    return {level.level() for level in stack if level.key() == kind}


def tracked(tensors: Iterable[Tensor]) -> bool:
    """Whether a transform that differentiates is active, or autograd records one of the tensors."""
    if differentiated() or forward_ad._current_level >= 0:
        return True
    recording = torch.is_grad_enabled()
    return recording and any(_unwrapped(tensor).requires_grad for tensor in tensors)


def _unwrapped(tensor: Tensor) -> Tensor:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def check_operands(tensors: Iterable[Tensor], what: str) -> None:
    """Raise where what is to become a custom function would lose a derivative.

    Complex operands are constants to it. Two forward modes must not meet in it: its tangent is
    computed from tensors it saved, and PyTorch saves them without the tangents of the outer
    forward mode, so that the mixed term would be missing.

    Args:
        tensors: the operands.
        what: what is being differentiated, the subject of the message.

    Raises:
        UnsupportedParameter: a complex operand is differentiated.
        ForwardOverForward: the operands carry two levels of forward mode.
    """
    tensors = list(tensors)
    if any(tensor.is_complex() and derivatives(tensor) for tensor in tensors):
        raise UnsupportedParameter(
            f"{what} was given a complex tensor that is differentiated, and knows derivatives of "
            "real ones only. Pass what it was made of, or torch.view_as_real(tensor) and "
            "torch.view_as_complex inside, or detach() it if it is a constant."
        )
    stack = _functorch.get_interpreter_stack() or []
    if not any(level.key() == _functorch.TransformType.Jvp for level in stack):
        return  # at most the one of dual numbers; looking at every tensor takes time
    seen = {pair for tensor in tensors for pair in derivatives(tensor)}
    count = sum(kind == "Jvp" for _, kind in seen)
    if count > 1:
        raise ForwardOverForward(
            f"{what} is inside {count} nested forward modes (jvp of jvp, or jacfwd of jacfwd), "
            "where PyTorch drops a term of the second derivative of a custom function. Use "
            "forward over reverse: torch.func.jvp of torch.func.grad for a product, "
            "torch.func.jacfwd of torch.func.jacrev (torch.func.hessian) for a matrix."
        )
