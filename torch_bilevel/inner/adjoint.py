"""Vector-Jacobian products of update rules, and the adjoints they move.

With the adjoint (ȳ, s̄) of (y_{k+1}, s_{k+1}) and a detached gradient G,

    (ȳ, Ḡ, s̄) ← (ȳ, s̄) · ∂Φ/∂(y, G, s) at (y_k, G, s_k)

written over the adjoints in place: by differentiating the rule, or, in half the time, by the
formulas of its own ``transpose`` where it has one and no hyperparameter is differentiated. Rules
act entry by entry (but for Muon's), so on the CPU large parameters are taken in pieces: a rule's
two dozen intermediates then cost no memory to speak of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .._vector import Layout
from ..errors import ReplayMismatch
from .rule import Hyper, State, UpdateRule

PIECE = 2**16  # entries


class Adjoint:
    """The adjoint of an iterate: of its values, its optimizer state, and the gradient consumed;
    and of what a proximal term pulls to.

    Args:
        layout: of the inner parameters.
        values: the adjoint of the values, flat; copied.
    """

    def __init__(self, layout: Layout, values: Tensor):
        self.layout = layout
        self.values = values.clone()
        self.gradient = torch.zeros_like(values)
        self.anchor: Tensor | None = None
        self.states: list[dict[str, Tensor]] = [{} for _ in layout.sizes]
        self._starts = [0, *accumulate(layout.sizes)]

    def pull_anchor(self, alpha: float) -> None:
        """Add the gradient's adjoint to that of what a proximal term pulls to."""
        if self.anchor is None:
            self.anchor = torch.zeros_like(self.values)
        self.anchor.add_(self.gradient, alpha=alpha)

    def initial(self) -> Tensor:
        """What reached the first iterate: directly, and as what a proximal term pulls to."""
        return self.values if self.anchor is None else self.values + self.anchor

    def parts(self, vector: Tensor) -> Sequence[Tensor]:
        """Flat views of a vector, one per parameter."""
        return torch.split(vector, self.layout.sizes)

    def slice(self, vector: Tensor, run: range) -> Tensor:
        """The flat view of a vector that belongs to a run of parameters."""
        start = self._starts[run.start]
        return vector[start : self._starts[run.stop]]

    def put_state(self, run: range, state: dict[str, Tensor]) -> None:
        """Set the adjoints of the states of a run of parameters, given flat for all of them."""
        if len(run) == 1:
            self.states[run.start] = state
            return
        sizes = self.layout.sizes[run.start : run.stop]
        parts = {key: torch.split(vector, sizes) for key, vector in state.items()}
        for place, index in enumerate(run):
            self.states[index] = {key: rows[place] for key, rows in parts.items()}


def pull_back(
    rule: UpdateRule,
    hyper: Hyper,
    point: tuple[Tensor, Tensor, State],
    following: Tensor,
    value_bar: Tensor,
    gradient_bar: Tensor,
    state_bar: dict[str, Tensor],
    hyper_leaves: Sequence[Tensor] = (),
    hyper_bars: Sequence[Tensor] = (),
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Pull the adjoint of one parameter through one step, in place.

    Args:
        rule: the update rule.
        hyper: the hyperparameters of the step.
        point: parameter, gradient and state before the step.
        following: the parameter after it, as recorded.
        value_bar: adjoint of the value, flat; overwritten.
        gradient_bar: adjoint of the gradient, flat; overwritten.
        state_bar: adjoint of the state after the step, flat; overwritten.
        hyper_leaves: the hyperparameters that are differentiated.
        hyper_bars: their adjoints; added to.

    Returns:
        The adjoint of the state before the step, and the norm of what the rule's value is off
        the recorded one, for every piece.
    """
    value, gradient, state = point
    dtype = value_bar.dtype
    here = value.device == value_bar.device
    if rule.transpose is not None and not hyper_leaves and here:
        return _by_formulas(
            rule, hyper, point, following, value_bar, gradient_bar, state_bar
        )
    before: dict[str, Tensor] = {}
    norms = []
    for piece in _pieces(rule, value, state, state_bar):
        y = leaf(_cut(value, piece), dtype)
        g = leaf(_cut(gradient, piece), dtype)
        s = {
            key: leaf(_cut(v, piece) if v.shape == value.shape else v, dtype)
            if differentiable(key, v)
            else v
            for key, v in state.items()
        }
        with torch.enable_grad():
            new_value, new_state = taken(rule, y, g, s, hyper, state_bar)
        pairs = [(new_value, value_bar)]
        pairs += [(new_state[key], bar) for key, bar in state_bar.items()]
        pairs = [
            (output, _cut(bar, piece).view(output.shape).to(output.device))
            for output, bar in pairs
            if output.requires_grad
        ]
        leaves = {key: v for key, v in s.items() if differentiable(key, v)}
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            [y, g, *hyper_leaves, *leaves.values()],
            [weight for _, weight in pairs],
            allow_unused=True,
        )
        # Autograd may hand an adjoint through: copied, unless it stays in its own place.
        written = [_address(value_bar), *map(_address, state_bar.values())]
        found = [
            part.clone()
            if part is not None
            and _address(part) in (written[1:] if i == 0 else written)
            else part
            for i, part in enumerate(found)
        ]
        _put(value_bar, piece, found[0])
        _put(gradient_bar, piece, found[1])
        others = 2 + len(hyper_leaves)
        for bar, part in zip(hyper_bars, found[2:others], strict=True):
            if part is not None:
                bar += part.to(bar)
        for key, bar in zip(leaves, found[others:], strict=True):
            if key not in before:
                known = state_bar.get(key)
                before[key] = (
                    value_bar.new_zeros(state[key].numel()) if known is None else known
                )
            _put(before[key], piece, bar)
        norms.append(distance(new_value.detach(), _cut(following, piece)))
    return before, norms


@torch.no_grad()
def _by_formulas(
    rule: UpdateRule,
    hyper: Hyper,
    point: tuple[Tensor, Tensor, State],
    following: Tensor,
    value_bar: Tensor,
    gradient_bar: Tensor,
    state_bar: dict[str, Tensor],
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """`pull_back` by the rule's transpose."""
    assert rule.transpose is not None
    value, gradient, state = point
    dtype, norms = value_bar.dtype, []
    state_bar = dict(state_bar)
    for piece in _pieces(rule, value, state, state_bar):
        y, g = (_cut(t, piece).to(dtype) for t in (value, gradient))
        s = {
            key: _cut(v, piece).to(dtype) if differentiable(key, v) else v
            for key, v in state.items()
        }
        after = taken(rule, y, g, s, hyper, state_bar)
        for key, new in after[1].items():  # nothing came back to it yet
            if key not in state_bar and differentiable(key, new):
                state_bar[key] = torch.zeros_like(value_bar)
        bars = [
            _cut(bar, piece).view(y.shape)
            for bar in (value_bar, gradient_bar, *state_bar.values())
        ]
        into = dict(zip(state_bar, bars[2:], strict=True))
        rule.transpose((y, g, s), after[1], hyper, bars[0], bars[1], into)
        norms.append(distance(after[0], _cut(following, piece)))
    return {key: bar for key, bar in state_bar.items() if key in state}, norms


def taken(
    rule: UpdateRule,
    value: Tensor,
    gradient: Tensor,
    state: State,
    hyper: Hyper,
    keys: Iterable[str],
) -> tuple[Tensor, State]:
    """What a rule returns, which may be the user's own.

    Raises:
        ReplayMismatch: it is not a parameter and a state with the given keys.
    """
    result = rule.step(value, gradient, state, hyper)
    name = f"The update rule of {rule.optimizer.__name__}"
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ReplayMismatch(
            f"{name} returned {type(result).__name__}; it must return (parameter, state)."
        )
    missing = [key for key in keys if key not in result[1]]
    if missing:
        raise ReplayMismatch(
            f"{name} returned a state without {', '.join(map(repr, missing))}, which the optimizer "
            "has after its step. Return every entry: {**state, ...}."
        )
    return result


def _pieces(
    rule: UpdateRule, value: Tensor, state: State, state_bar: dict[str, Tensor]
) -> Iterator[slice | None]:
    """Ranges of entries that can be taken one after the other; None is all at once."""
    whole = (
        not rule.elementwise
        or value.device.type != "cpu"
        or value.numel() <= PIECE
        or any(bar.numel() != value.numel() for bar in state_bar.values())
        or any(v.shape != value.shape for k, v in state.items() if differentiable(k, v))
    )
    if whole:
        yield None
        return
    for start in range(0, value.numel(), PIECE):
        yield slice(start, min(start + PIECE, value.numel()))


def _cut(tensor: Tensor, piece: slice | None) -> Tensor:
    return tensor if piece is None else tensor.reshape(-1)[piece]


def leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A leaf of the given dtype with the tensor's values."""
    return tensor.detach().to(dtype).requires_grad_()


def differentiable(key: str, value: Any) -> bool:
    """Whether an entry of an optimizer's state has an adjoint and a tangent."""
    return isinstance(value, Tensor) and value.is_floating_point() and key != "step"


def _put(bar: Tensor, piece: slice | None, value: Tensor | None) -> None:
    """Write a piece of an adjoint; None is zero."""
    into = _cut(bar, piece)
    if value is None:
        into.zero_()
    elif value.data_ptr() != into.data_ptr():
        into.copy_(value.reshape(-1))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@torch.no_grad()
def distance(predicted: Tensor, actual: Tensor) -> Tensor:
    """‖predicted − actual‖ of a piece."""
    return torch.linalg.vector_norm(predicted - actual.to(predicted))


@torch.no_grad()
def step_norms(predicted: Tensor, actual: Tensor, before: Tensor) -> Tensor:
    """‖predicted − actual‖, ‖actual − before‖ and ‖actual‖ of a piece."""
    a = actual.to(predicted.device, predicted.dtype)
    parts = (predicted - a, a - before, a)
    return torch.stack([torch.linalg.vector_norm(part) for part in parts])


def mismatch(norms: Sequence[Tensor], eps: float) -> Tensor:
    """How far the rules are from the recorded step: beyond rounding, relative to the step.

    Args:
        norms: of every piece.
        eps: the rounding of the parameters' dtype.
    """
    off, moved, size = total(norms)
    return relative(off, moved, size, eps)


def total(norms: Sequence[Tensor]) -> Tensor:
    """The norms of vectors from those of their pieces, which may be on several devices."""
    table = torch.stack([norm.to(norms[0].device) for norm in norms])
    return torch.linalg.vector_norm(table, dim=0)


def relative(off: Tensor, moved: Tensor, size: Tensor, eps: float) -> Tensor:
    """A difference beyond rounding, relative to the step; see `mismatch`."""
    return torch.where(off <= 8 * eps * size, torch.zeros_like(off), off / moved)
