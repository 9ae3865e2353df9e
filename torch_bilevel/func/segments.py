"""Two ways to differentiate a stretch of steps without keeping its graph.

    (y_last, s_last) = F(y_first, s_first, x, data)

- `recomputed`: reverse mode that evaluates F again when its derivative is wanted;
- `final_by_tangents`: forward mode, ∂y_last/∂x is computed with y_last.

Both are custom functions over every tensor F depends on; what is not a tensor (Adam's number of
steps) is static.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentCarriesGraph, NoSecondDerivative, UnnamedClosure
from ..second_order import opaque
from . import trees
from .evaluation import Conditions, on_constants
from .levels import batches, check_operands, derivatives

_UNCOMPILED = "tb.func.unroll with"
_INSTEAD = (
    "cannot be part of a fullgraph, for its derivative is a custom function; call torch.compile "
    "without fullgraph=True, or unroll without it"
)


class Stretch:
    """F as a function of tensors that gives tensors.

    Args:
        steps: the loop.
        at: where it starts, with the data of its steps alone.
        first: the number of the first step.
        last: one more than that of the last.

    Attributes:
        operands: the tensors in ``at``.
        result: where they lie in what comes out, known after a call.
    """

    def __init__(self, steps: Any, at: Any, first: int, last: int):
        self.steps, self.first, self.last = steps, first, last
        self.operands = trees.Operands(at)
        self.result: trees.Operands
        self.conditions = Conditions(self.operands.tensors)

    def take(self) -> list[Tensor]:
        """The operands, which are then no longer kept here."""
        tensors, self.operands.tensors = self.operands.tensors, []
        return tensors

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Inner variables, then state; every call draws the random numbers of the first."""
        with self.conditions():
            at = self.steps.on(self.operands.tree(tensors), self.first, self.last)
        self.result = trees.Operands((at.inner, at.state))
        # views, for a custom function must not return what it was given
        found = tuple(t.view_as(t) for t in self.result.tensors)
        self.result.tensors = []  # they would outlive the call, and their graph with them
        return found

    def real(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The floating-point part of the result."""
        return tuple(t for t in self(*tensors) if trees.is_real(t))


class _Pulled:
    """(operands, bar) ↦ Σ bar·∂F/∂operand, one for each floating-point operand."""

    def __init__(self, function: Any, count: int):
        self.function, self.count = function, count

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        operands, bar = tensors[: self.count], tensors[self.count :]
        found = trees.pull(self.function.real, operands, bar)
        return tuple(t for t in found if t is not None)

    real = __call__


class _Recomputed(torch.autograd.Function):
    """F, kept as its operands; and so is its derivative, to any order.

    ``torch.func.grad`` records what a backward pass does, in case that is differentiated too. It
    would keep the graph of everything computed again, all there is to save, if the derivative
    were not a function of this kind itself.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Any, *operands: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return function(*operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, *operands = inputs
        ctx.real = [trees.is_real(t) for t in output]
        ctx.mark_non_differentiable(*(t for t in output if not trees.is_real(t)))
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        operands = ctx.saved_tensors
        bar = [b for b, real in zip(bars, ctx.real, strict=True) if real]
        pulled = _Pulled(ctx.function, len(operands))
        found = iter(_Recomputed.apply(pulled, *operands, *bar))  # type: ignore[arg-type]
        return None, *(next(found) if trees.is_real(t) else None for t in operands)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        found = trees.push(ctx.function.real, ctx.saved_tensors, tangents)
        found = iter(found) if found is not None else None
        return tuple(next(found) if found and real else None for real in ctx.real)


@opaque(f"{_UNCOMPILED} checkpoint_every=... {_INSTEAD}")
def recomputed(steps: Any, at: Any, start: int, stop: int, every: int) -> list[Tensor]:
    """The last iterate, with ``every`` steps at a time computed again for derivatives."""
    _refuse_closures(steps, at, start, "checkpoint_every=...")
    for first in range(start, stop, every):
        last = min(first + every, stop)
        piece = at._replace(data=steps.batches(at.data, first, last))
        stretch = Stretch(steps, piece, first, last)
        check_operands(stretch.operands.tensors, "unroll(checkpoint_every=...)")
        tensors = _Recomputed.apply(stretch, *stretch.take())
        inner, state = stretch.result.tree(tensors)
        at = at._replace(inner=inner, state=state)
    return at.inner


class _ByTangents(torch.autograd.Function):
    """F with ∂y/∂x, whose rows belong to the entries of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        stretch: Stretch, at: Sequence[int], num_inner: int, *operands: Tensor
    ) -> tuple[Tensor, ...]:
        outer = [operands[i] for i in at]
        layout = trees.Flat(outer, "outer").layout

        def of(*outer: Tensor) -> tuple[Tensor, ...]:
            every = list(operands)
            for i, tensor in zip(at, outer, strict=True):
                every[i] = tensor
            return stretch(*every)[:num_inner]

        def along(direction: Tensor) -> tuple[Any, ...]:
            return torch.func.jvp(of, tuple(outer), tuple(layout.split(direction)))

        basis = torch.eye(layout.numel, dtype=layout.dtype, device=layout.device)
        value, rows = torch.func.vmap(along, randomness="same")(basis)
        return *(y[0] for y in value), *rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.at, ctx.num_inner, *operands = inputs
        ctx.num_operands = len(operands)
        ctx.layout = trees.Flat([operands[i] for i in ctx.at], "outer").layout
        ctx.set_materialize_grads(False)
        rows = output[ctx.num_inner :]
        ctx.save_for_backward(*rows)
        ctx.save_for_forward(*rows)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if any(bar is not None for bar in bars[ctx.num_inner :]):
            raise _twice()
        # x̄ = Σ (∂y/∂x)ᵀ ȳ
        parts = [
            rows.reshape(ctx.layout.numel, -1) @ bar.reshape(-1)
            for rows, bar in zip(ctx.saved_tensors, bars, strict=False)
            if bar is not None
        ]
        found: list[Any] = [None] * ctx.num_operands
        if parts:
            pieces = ctx.layout.split(sum(part.to(ctx.layout.dtype) for part in parts))
            for i, piece in zip(ctx.at, pieces, strict=True):
                found[i] = piece
        return None, None, None, *found

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:  # type: ignore[override]
        some = [tangents[3 + i] for i in ctx.at]
        along = ctx.layout.flatten(some)
        # ẏ = (∂y/∂x) ẋ
        moved = [
            torch.tensordot(along.to(rows.dtype), rows, 1) for rows in ctx.saved_tensors
        ]
        # `_refuse_twice` leaves nobody who asks for the tangent of ∂y/∂x; it would be seen
        unknown = [torch.full_like(rows, torch.nan) for rows in ctx.saved_tensors]
        return *moved, *unknown


@opaque(f"{_UNCOMPILED} mode='forward' {_INSTEAD}")
def final_by_tangents(steps: Any, at: Any, start: int, stop: int) -> list[Tensor]:
    """The last iterate with ∂/∂x computed on the way, in memory that no step adds to."""
    piece = at._replace(data=steps.batches(at.data, start, stop))
    stretch = Stretch(steps, piece, start, stop)
    tensors = stretch.take()
    # the places of x among the operands: its leaves are tensors, and so are those of y
    before = len(trees.Operands((at.inner, at.state)).tensors)
    count = len(trees.Operands(at.outer).tensors)
    which = range(before, before + count)
    _refuse_other_derivatives(at, start)
    _refuse_closures(steps, at, start, "mode='forward'")
    if not count:
        return list(stretch(*tensors)[: len(at.inner)])
    _refuse_twice([tensors[i] for i in which])
    check_operands(tensors, "unroll(mode='forward')")
    found = _ByTangents.apply(stretch, which, len(at.inner), *tensors)
    return list(found[: len(at.inner)])


def _refuse_closures(steps: Any, at: Any, start: int, option: str) -> None:
    """Raise where a step depends on a transformed tensor that is not one of its operands.

    A custom function would lose that derivative without a word, or mistake lanes of ``vmap`` for
    another axis. A step on plain constants in place of the operands shows it; it costs one step.

    Raises:
        UnnamedClosure: with what to write.
    """
    operands = trees.Operands(
        at._replace(data=steps.batches(at.data, start, start + 1))
    )

    def step(*tensors: Tensor) -> Any:
        after = steps.on(operands.tree(tensors), start, start + 1)
        return after.inner, after.state

    owner = f"unroll({option}): the inner loss or the rule"
    seen, _ = on_constants(step, operands.tensors, owner)
    if any(map(derivatives, seen)):
        raise UnnamedClosure(
            f"unroll({option}): the inner loss or the rule uses a tensor that is differentiated "
            "and is neither in initial, outer nor data, such as a variable of the function "
            "around it or a parameter of a module with requires_grad=True; its derivative would "
            "be lost. Pass it in outer (a learned rate as rule=lambda outer, step: ...), or "
            f"detach() it if it is a constant, or leave {option} out."
        )
    lanes = set().union(*map(batches, seen))
    outside = set().union(*map(derivatives, operands.tensors))
    # a vmap inside which everything is differentiated is evaluated lane by lane, and is right
    if any(level < lane for lane in lanes for level, _ in outside):
        raise UnnamedClosure(
            f"unroll({option}): inside vmap, with the derivative taken outside of it, the inner "
            "loss or the rule uses a tensor that vmap batches and that is neither in initial, "
            "outer nor data, or it draws random numbers for each lane. Pass the tensor, or the "
            f"noise, as data: train(initial, outer, tensor); or leave {option} out."
        )


def _refuse_other_derivatives(at: Any, start: int) -> None:
    """Raise where forward mode is asked for derivatives it does not carry.

    Raises:
        ArgumentCarriesGraph: with what to write.
    """
    for name, part in {
        "initial": at.inner,
        "data": at.data,
        "the rule": at.hyper,
    }.items():
        if any(map(derivatives, trees.Operands(part).tensors)):
            raise ArgumentCarriesGraph(
                f"unroll(mode='forward') differentiates with respect to outer only, and a tensor "
                f"in {name} requires a derivative. Write .detach() if it is a constant, put it "
                "into outer, or use mode='reverse'."
            )


def _refuse_twice(outer: Sequence[Tensor]) -> None:
    """Raise where it is known beforehand that ∂y/∂x will be differentiated again.

    Raises:
        NoSecondDerivative: two levels of ``torch.func``, or forward mode over autograd.
    """
    found = set().union(*map(derivatives, outer))
    dual_over_autograd = {(0, "Grad"), (0, "Jvp")} <= found
    if len(found - {(0, "Grad")}) > 1 or dual_over_autograd:
        raise _twice()


def _twice() -> NoSecondDerivative:
    return NoSecondDerivative(
        "unroll(mode='forward') is differentiated twice; it carries the first derivative of the "
        "iterates and nothing of the second. Use mode='reverse', with checkpoint_every='auto' "
        "where memory is short."
    )
