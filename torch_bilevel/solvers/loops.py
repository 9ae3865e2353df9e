"""Iterations where the host may not look: under ``torch.func`` transforms and ``torch.compile``.

An iteration is a tuple of tensors and a pure step that leaves it alone once it has stopped, so that
under ``vmap`` every lane stops on its own. In plain code the host looks and stops early; under a
transform all steps are taken; inside ``torch.compile`` it is one ``while_loop``, whose body is
compiled once whatever the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from .._transforms import may_look, transformed

S = TypeVar("S", bound=tuple[Any, ...])
F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """Compiled code runs the function once, while it is traced, and keeps what it returned.

    As ``torch.compiler.assume_constant_result``, which imports dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def differentiated() -> bool:
    """Whether a transform that differentiates is active."""
    kind = torch._C._functorch.TransformType  # type: ignore[attr-defined]
    stack = torch._C._functorch.get_interpreter_stack() or []  # type: ignore[attr-defined]
    return any(level.key() in (kind.Grad, kind.Jvp) for level in stack)


def may_stop_early(b: Tensor, rtol: float) -> bool:
    """Whether looking at a flag each step is allowed, and worth a host synchronisation."""
    return may_look() and (rtol > 0 or b.device.type == "cpu")


def repeat(
    step: Callable[[S], S],
    state: S,
    num_steps: int,
    going: Callable[[S], Any],
    early: bool,
) -> S:
    """Take a step until the iteration stops, at most ``num_steps`` times.

    Args:
        step: of a state makes the next; pure under transforms and compiled; changes nothing that
            matters once it has stopped.
        state: a tuple of tensors; also of arrays where the host may look.
        num_steps: cap on the number of steps.
        going: whether it goes on, 0-d.
        early: see `may_stop_early`.

    Returns:
        The last state.
    """
    if torch.compiler.is_compiling() and not transformed():
        return _compiled(step, state, num_steps, going)
    for _ in range(num_steps):
        if early and not bool(going(state)):
            break
        state = step(state)
    return state


def _compiled(
    step: Callable[[S], S],
    state: S,
    num_steps: int,
    going: Callable[[S], Tensor],
) -> S:
    """`repeat` as one ``while_loop``; its operands may not share memory, hence the copies."""

    def goes_on(k: Tensor, *parts: Tensor) -> Tensor:
        return (k < num_steps) & going(_like(state, parts))

    def body(k: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        return k + 1, *(part.clone() for part in step(_like(state, parts)))

    start = torch.zeros((), dtype=torch.int64, device=state[0].device)
    operands = (start, *(part.clone() for part in state))
    return _like(state, while_loop(goes_on, body, operands)[1:])


def _like(state: S, parts: Any) -> S:
    """Parts as a state of the same kind: a plain or a named tuple."""
    kind = type(state)
    return kind(*parts) if hasattr(state, "_fields") else kind(parts)
