"""The graph of the user's own evaluation, kept while the parameters move on.

    L = g(x, y_k)                        evaluated once, when the user calls the registered loss
    G = ∇_y L, with its graph            evaluated once, when the user back-propagates it
    H v, J v = ∂_{y,x}⟨G, v⟩             later, though the optimizer has written y_{k+1} over y_k

What the two graphs saved of the parameters is handed back from the record of the iterate, so the
in-place step does not spoil them, and nothing is evaluated a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from ..errors import BatchChanged, InvalidLoss, ReplayMismatch, StalePoint
from ..second_order import second_order
from .calls import Call, scalar, with_loss
from .once import nodes_of
from .variables import gradients

if TYPE_CHECKING:
    from .problem import BilevelProblem

# which parameter, which part of it, and the version it had
_Place = tuple[int, torch.Size, tuple[int, ...], int, int]
_TRANSFORMED = (
    "An inner loss uses torch.func (grad, vjp, jvp, ...) or dual numbers, whose graphs cannot be "
    "kept: leave keep_graph=True out."
)


class Saved:
    """What the graphs of one call saved; it knows nothing of the graphs, which hold it.

    A reference to them from here would be a cycle through C++, which is never collected.

    Args:
        problem: the problem at the time of the call.

    Attributes:
        values: the recorded iterate, once the optimizer has stepped; None while it is live.
        versions: those of the parameters when it was recorded.
        nbytes: bytes of what is not the iterate's.
    """

    def __init__(self, problem: BilevelProblem):
        self.values: Sequence[Tensor] | None = None
        self.versions: Sequence[int] = ()
        self.nbytes = 0
        self._live = problem.inner.tensors
        self._where, self._cloned = problem.places()
        self._seen: set[int] = set()

    def hooks(self) -> saved_tensors_hooks:
        """Saving inside this context survives the optimizer's step."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.layout is not torch.strided:  # a constant matrix, say
            return tensor.detach(), tensor._version
        try:
            address = tensor.untyped_storage().data_ptr()
        except RuntimeError as error:  # a level of torch.func, which has no memory
            raise InvalidLoss(_TRANSFORMED) from error
        index = self._where.get(address)
        if index is not None and _is_part(tensor, self._live[index]):
            place = tensor.size(), tensor.stride(), tensor.storage_offset()
            return index, *place, self._live[index]._version
        if index is not None or address in self._cloned:
            tensor = tensor.clone()
            address = tensor.untyped_storage().data_ptr()
        if address not in self._seen:
            self._seen.add(address)
            self.nbytes += tensor.untyped_storage().nbytes()
        # Not the tensor itself: an output that its own node saved would never be freed.
        return tensor.detach(), tensor._version

    def _unpack(self, packed: _Place | tuple[Tensor, int]) -> Tensor:
        if len(packed) == 2:
            tensor, version = packed
            if tensor._version != version:
                raise BatchChanged(
                    f"A tensor that the graph of an inner step holds (shape {tuple(tensor.shape)}, "
                    f"{tensor.dtype}) was changed in place since the step. With keep_graph=True "
                    "nothing the loss used may be written to before the outer step; use a copy, "
                    "or leave keep_graph=True out."
                )
            return tensor
        index, size, stride, offset, version = packed
        live = self._live[index]
        if self.values is None:
            if live._version != version:
                raise StalePoint(
                    "An inner loss is back-propagated after a step has moved the parameters that "
                    "it was evaluated at. Evaluate it and call backward() without a step in "
                    "between."
                )
            return live.detach().as_strided(size, stride, offset)
        if self.versions[index] != version:
            raise ReplayMismatch(
                "The parameters were written to between an inner loss and the step that consumed "
                "its gradient (weight noise, an adversarial or SAM point), so the loss was "
                "evaluated elsewhere than the step began. No unrolling knows that; leave it out, "
                "or use an implicit estimator."
            )
        value = self.values[index].to(live.device)
        return value.as_strided(size, stride, value.storage_offset() + offset)


def _is_part(tensor: Tensor, live: Tensor) -> bool:
    """Whether memory of a parameter is read as the parameter itself reads it."""
    # the imaginary part of a complex view is read with its sign turned
    return tensor.dtype is live.dtype and not tensor.is_neg()


class KeptGraph:
    """The graphs of one call of an inner loss.

    Args:
        problem: the problem at the time of the call.

    Attributes:
        saved: what the graphs saved.
        parts: ∇_y of the loss with graph, per inner parameter, times ``weight``.
        weight: what the loss was back-propagated with.
    """

    def __init__(self, problem: BilevelProblem):
        self.problem = problem
        self.saved = Saved(problem)
        self.parts: list[Tensor | None] = []
        self.weight: Tensor | None = None

    def weighted(self, weight: Tensor | float) -> list[Tensor | None]:
        """∇_y of the loss times a weight, with graph."""
        own = self.weight
        assert own is not None  # the loss was back-propagated
        if isinstance(weight, float) and weight == own.item():
            return self.parts
        return [None if part is None else part * (weight / own) for part in self.parts]


class KeptLoss(torch.autograd.Function):
    """A loss of the inner parameters whose gradient keeps its own graph."""

    @staticmethod
    def forward(
        ctx: Any, kept: KeptGraph, evaluate: Callable[[], Tensor], *inner: Tensor
    ) -> Tensor:
        """Evaluate the user's loss with its graph."""
        problem = kept.problem
        region = second_order(problem.modules.recurrent, problem.modules.weight_norm)
        forward = forward_ad._set_fwd_grad_enabled(True)  # off inside a custom function
        with torch.enable_grad(), forward, region, kept.saved.hooks():
            try:
                ctx.loss = evaluate()
            except RuntimeError as error:
                if "saved tensor hooks" in str(error):
                    raise InvalidLoss(_TRANSFORMED) from error
                raise
        ctx.kept = kept
        return ctx.loss.detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """∇_y g times the incoming weight; its graph stays with the call."""
        kept = ctx.kept
        with torch.enable_grad(), kept.saved.hooks():
            (kept.parts,) = gradients(
                ctx.loss, grads[0], kept.problem.inner.tensors, create_graph=True
            )
        kept.weight = grads[0].detach()
        # Copies: .grad takes what it is given, and is added to and clipped in place.
        found = (None if p is None else p.detach().clone() for p in kept.parts)
        return None, None, *found


def keep(problem: BilevelProblem, call: Call, args: tuple, kwargs: dict) -> Any:
    """Evaluate an inner loss for the user, and keep its graphs with the call.

    Args:
        problem: the problem at present.
        call: the remembered call; its ``kept`` is set.
        args: the user's own arguments, which the function may write to.
        kwargs: those given by name.

    Returns:
        What the function returns, its loss replaced by one with the same value and gradient.

    Raises:
        InvalidLoss: it depends on a parameter that is in neither optimizer.
    """
    call.kept = KeptGraph(problem)
    result: Any = None

    def loss() -> Tensor:
        nonlocal result
        result = call.function(
            *map(_remembered_array, args, call.args),
            **{k: _remembered_array(v, call.kwargs[k]) for k, v in kwargs.items()},
        )
        value = scalar(result, call.name)
        if call.function not in problem.walked:
            _refuse_others(value, problem, call.name)
            problem.walked.add(call.function)
        return value

    value = KeptLoss.apply(call.kept, loss, *problem.inner.tensors)
    return with_loss(result, value)


def _remembered_array(given: Any, remembered: Any) -> Any:
    """The copy in place of an array: the graph may hold its memory, and nobody writes to it."""
    return remembered if isinstance(given, np.ndarray) else given


def _refuse_others(loss: Tensor, problem: BilevelProblem, name: str) -> None:
    """Refuse leaves whose ``.grad`` would stay empty; looked for once for every function."""
    for node in nodes_of([loss]):
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in problem.live:
            raise InvalidLoss(
                f"The inner loss {name!r} depends on a tensor of shape {tuple(leaf.shape)} that "
                "requires grad and is in neither optimizer. With keep_graph=True its .grad would "
                "stay empty. Call requires_grad_(False) on it if it is not trained. If the loss "
                "makes it, for a penalty on the gradient in its inputs, leave keep_graph=True out."
            )
