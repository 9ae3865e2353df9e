"""Pytrees: which leaves are differentiated, and how they lie in one flat vector.

A pytree is a tensor, or a dict, list, tuple, named tuple or registered class of pytrees, with
numbers, strings or None among its leaves, as in ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._vector import Layout
from ..errors import UnsupportedParameter


def is_real(leaf: Any) -> bool:
    """Whether a leaf can be differentiated: a floating-point tensor."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def detached(tree: Any) -> Any:
    """A pytree with its tensors detached."""
    return pytree.tree_map(
        lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree
    )


def translated(there: Any, start: Any) -> Any:
    """The values of ``there``, without their derivative, which move as those of ``start`` do.

    What takes y_0 to y is a translation to first order: dy = dy_0.
    """

    def moved(y: Tensor, a: Tensor) -> Tensor:
        zero = a - a.detach()
        # a − a is no number where a is infinite
        return y.detach() + torch.where(torch.isfinite(a), zero, 0.0)

    return pytree.tree_map(moved, there, start)


class Flat:
    """How the leaves of a pytree of floating-point tensors lie in one vector.

    Args:
        tree: the pytree; only its structure is kept.
        role: what it is, in messages.

    Raises:
        UnsupportedParameter: it has no leaf, or one that is not a dense floating-point tensor.
    """

    def __init__(self, tree: Any, role: str):
        leaves, self.structure = pytree.tree_flatten(tree)
        for place, leaf in enumerate(leaves):
            if not is_real(leaf):
                where, kind = _path(tree, place, role), type(leaf).__name__
                seen = f"a tensor of {leaf.dtype}" if kind == "Tensor" else f"a {kind}"
                raise UnsupportedParameter(
                    f"{where} is {seen}; every leaf of the {role} variables must be a "
                    "floating-point tensor. Write torch.tensor(...) for a number, "
                    "torch.from_numpy(...) for an array and dict(module.named_parameters()) for a "
                    "module, and pass what is not differentiated as data."
                )
            if leaf.layout is not torch.strided:
                where = _path(tree, place, role)
                raise UnsupportedParameter(
                    f"{where} is sparse; write {where}.to_dense()."
                )
        if not leaves:
            raise UnsupportedParameter(
                f"The {role} variables ({type(tree).__name__}) have no tensor in them; pass a "
                "tensor, or a dict such as dict(module.named_parameters())."
            )
        self.layout = Layout(leaves, [f"{role}, leaf {k}" for k in range(len(leaves))])

    def vector(self, tree: Any, role: str = "the result") -> Tensor:
        """A pytree of this structure as one vector, at least float32.

        Raises:
            UnsupportedParameter: it has another structure.
        """
        leaves, structure = pytree.tree_flatten(tree)
        if structure != self.structure:
            raise UnsupportedParameter(
                f"{role} must be a pytree like the variables it belongs to: expected "
                f"{self.structure}, got {structure}."
            )
        for place, (leaf, shape) in enumerate(
            zip(leaves, self.layout.shapes, strict=True)
        ):
            if not isinstance(leaf, Tensor) or leaf.shape != shape:
                seen = getattr(leaf, "shape", type(leaf).__name__)
                where = _path(tree, place, role)
                raise UnsupportedParameter(
                    f"{where}: a tensor of shape {tuple(shape)} was expected, got {seen}."
                )
        return self.layout.flatten(leaves)

    def tree(self, vector: Tensor) -> Any:
        """A vector as a pytree of this structure, in the dtypes of the leaves."""
        return pytree.tree_unflatten(self.layout.split(vector), self.structure)


def _path(tree: Any, place: int, role: str) -> str:
    """Where a leaf stands, as one would write it; its number where a class does not tell."""
    try:
        pairs, _ = pytree.tree_flatten_with_path(tree)
    except ValueError:  # registered without keys
        return f"leaf {place} of {role}"
    return f"{role}{pytree.keystr(pairs[place][0])}"


class Operands:
    """The tensors among the leaves of a pytree, and what puts them back among the rest.

    Args:
        tree: any pytree; what is not a tensor is kept as it is.
    """

    def __init__(self, tree: Any):
        self.leaves, self.structure = pytree.tree_flatten(tree)
        self.at = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [self.leaves[i] for i in self.at]
        for i in self.at:
            self.leaves[i] = None

    def tree(self, tensors: Sequence[Tensor]) -> Any:
        """The pytree with other tensors in their places."""
        leaves = list(self.leaves)
        for i, tensor in zip(self.at, tensors, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, self.structure)


def pull(
    function: Callable[..., Any], operands: Sequence[Tensor], bar: Any
) -> list[Tensor | None]:
    """Σ bar·∂function/∂operand for each floating-point operand; None for others."""
    real = [i for i, operand in enumerate(operands) if is_real(operand)]
    if not real:
        return [None] * len(operands)
    whole = _of_some(function, operands, real)
    found = torch.func.vjp(whole, *(operands[i] for i in real))[1](bar)
    bars: list[Tensor | None] = [None] * len(operands)
    for i, part in zip(real, found, strict=True):
        bars[i] = part
    return bars


def push(
    function: Callable[..., Any],
    operands: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
) -> Any:
    """Σ ∂function/∂operand·tangent; a missing tangent is zero. None if all are missing.

    As the derivative of `pull`, which is linear in what it pulls: operations need no forward mode.
    """
    real = [i for i, tangent in enumerate(tangents) if tangent is not None]
    if not real:
        return None
    whole = _of_some(function, operands, real)
    primals = tuple(operands[i] for i in real)
    found, pull_back = torch.func.vjp(whole, *primals)  # type: ignore[misc]
    zero = pytree.tree_map(torch.zeros_like, found)
    forward = torch.func.vjp(pull_back, zero)[1]
    return forward(tuple(tangents[i] for i in real))[0]


def _of_some(
    function: Callable[..., Any], operands: Sequence[Tensor], which: Sequence[int]
) -> Callable[..., Any]:
    """The function of some operands, the others as they are."""

    def of(*some: Tensor) -> Any:
        every = list(operands)
        for i, operand in zip(which, some, strict=True):
            every[i] = operand
        return function(*every)

    return of
