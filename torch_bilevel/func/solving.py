"""A solver that may be any program, run on plain tensors under any transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import UnsupportedTransform
from .closures import Named
from .trees import Operands


class Undifferentiated(torch.autograd.Function):
    """What a solver returns, as tensors without derivative."""

    @staticmethod
    def forward(run: Run, *tensors: Tensor) -> Any:  # type: ignore[override]
        """Run the solver on plain tensors."""
        with torch.enable_grad():  # solvers may differentiate
            return tuple(
                found.detach() for found in run(*(t.detach() for t in tensors))
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Its results have no derivative."""
        ctx.mark_non_differentiable(*output)
        ctx.count = len(output), len(inputs)

    @staticmethod
    def backward(ctx: Any, *bars: Any) -> Any:  # type: ignore[override]
        """None for every argument."""
        return (None,) * ctx.count[1]

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> Any:  # type: ignore[override]
        """None for every result."""
        return (None,) * ctx.count[0]

    @staticmethod
    def vmap(info: Any, in_dims: Any, run: Any, *tensors: Tensor) -> Any:  # type: ignore[override]
        """One lane after the other."""
        if not info.batch_size:
            raise UnsupportedTransform(
                "vmap over no lanes: what a solver would return is not known. Leave out the call."
            )
        lanes = []
        for lane in range(info.batch_size):
            own = [
                t if dim is None else t.select(dim, lane)
                for t, dim in zip(tensors, in_dims[1:], strict=True)
            ]
            lanes.append(Undifferentiated.apply(run, *own))
        return tuple(map(torch.stack, zip(*lanes, strict=True))), 0


def _own(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


class Run:
    """A solver on flat lists of tensors; the structure of what it returns is seen when it ran."""

    def __init__(
        self, solve: Callable[..., Any], arguments: Operands, like: Any, named: Named
    ):
        self.solve = solve
        self.named = named
        self.count = len(arguments.tensors)
        self.arguments = arguments
        self.like = [x for x in pytree.tree_leaves(like) if isinstance(x, Tensor)]
        self.returned: Operands | None = None

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors of what the solver returns."""
        initial, outer, data = self.arguments.tree(tensors[: self.count])
        # solvers may write into what they are given
        initial, outer, data = pytree.tree_map(_own, (initial, outer, data))
        with self.named.replaced_by(tensors[self.count :]):
            found = self.solve(initial, outer, *data)
        leaves, structure = pytree.tree_flatten(found)
        like = self.like
        if len(like) != len(leaves):
            like = like[:1] or [_promoted(tensors)]
            like = like * len(leaves)
        found = pytree.tree_unflatten(map(_tensor, leaves, like), structure)
        self.returned = Operands(found)
        return self.returned.tensors


def _promoted(tensors: Sequence[Tensor]) -> Tensor:
    """Of the precision of all of them together, on the device of the first."""
    real = [t for t in tensors if t.is_floating_point()]
    if not real:
        return torch.empty(())
    dtype = reduce(torch.promote_types, [t.dtype for t in real])
    return torch.empty((), dtype=dtype, device=real[0].device)


def _tensor(leaf: Any, like: Tensor) -> Any:
    """A NumPy array or a number as a tensor, in the dtype of its start, or of all operands."""
    if isinstance(leaf, Tensor) or not hasattr(leaf, "__array__"):
        if not isinstance(leaf, float):
            return leaf
    found = torch.as_tensor(leaf)
    real = found.is_floating_point() and like.is_floating_point()
    return found.to(like.device, like.dtype if real else found.dtype)
