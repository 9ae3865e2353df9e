"""The live parameters of one level: read, overwrite for a while, put back.

To evaluate anything at another point the parameters are overwritten through ``p.data``, used
and put back. ``p.data.copy_`` leaves the version counter alone, so graphs the user is holding
stay valid after the restore (``p.copy_`` under ``no_grad`` would invalidate every one of them).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence, Set
from itertools import chain, compress
from operator import attrgetter, methodcaller
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._vector import Layout
from ..errors import UnsupportedParameter

_version = attrgetter("_version")
_place = methodcaller("data_ptr")
_hooks = attrgetter("_backward_hooks")
_NOTHING = contextlib.nullcontext()


class Variables:
    """Live parameters and their flat layout.

    Args:
        role: ``"inner"`` or ``"outer"``, used in messages.
        tensors: the leaf parameters, in order.
        names: one name each.

    Raises:
        UnsupportedParameter: a parameter is sparse, complex, expanded, not a leaf, ...
    """

    def __init__(self, role: str, tensors: Sequence[Tensor], names: Sequence[str]):
        _checks.parameters(role, tensors, names)
        self.role = role
        self.tensors = list(tensors)
        self.layout = Layout(tensors, names)
        self.ids = {id(tensor) for tensor in tensors}
        self.depth = 0  # how many swaps are open
        self.point = 0  # counts overwrites, so that a linearisation can tell
        self.moved: Set[int] = frozenset()  # ids; see `moving`

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self.ids

    def read(self) -> Tensor:
        """The present values as one flat vector (a copy)."""
        return self.layout.flatten([t.detach() for t in self.tensors]).clone()

    def overwrite(self, values: Sequence[Tensor]) -> None:
        """Set every parameter, invisibly to autograd's version counters."""
        self.point += 1
        torch._foreach_copy_(  # type: ignore[attr-defined]
            [t.data for t in self.tensors], list(values)
        )

    @contextlib.contextmanager
    def swapped(self) -> Iterator[list[Tensor]]:
        """At exit, also by exception, every parameter has the value it had at entry.

        Yields:
            Copies of the values at entry.
        """
        saved = [tensor.detach().clone() for tensor in self.tensors]
        point = self.point
        self.depth += 1
        try:
            yield saved
        finally:
            self.overwrite(saved)
            self.depth -= 1
            self.point = point

    @contextlib.contextmanager
    def moving(self, which: Sequence[bool]) -> Iterator[None]:
        """Some parameters are no constants meanwhile, though a step may hold them frozen.

        The step leaves them where earlier ones took them, which depends on x: losses are
        differentiated with respect to them, though it consumes nothing of that gradient.

        Args:
            which: those that a step has moved, or that begin at an outer variable.
        """
        there = list(compress(self.tensors, which))
        frozen = [tensor for tensor in there if not tensor.requires_grad]
        before, self.moved = self.moved, {id(tensor) for tensor in there}
        for tensor in frozen:
            tensor.requires_grad_(True)
        try:
            yield
        finally:
            for tensor in frozen:
                tensor.requires_grad_(False)
            self.moved = before

    def token(self) -> tuple:
        """What must not change while a linearisation lives."""
        # maps, for a frame costs microseconds where caches are cold: after every product
        versions, places = map(_version, self.tensors), map(_place, self.tensors)
        return self.point, self.depth, *versions, *places


def gradients(
    output: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor] | None,
    *groups: Sequence[Tensor | None],
    **options: bool,
) -> list[list[Tensor | None]]:
    """``autograd.grad`` in one pass, per group of tensors; None where one is not reached.

    Frozen tensors (``requires_grad=False``) are never reached. Hooks of the tensors are left out:
    the user's are for gradients of the loss, and would run on rows of H v as well.
    """
    # now, for hooks that run in the pass may change it
    live = [
        [tensor is not None and tensor.requires_grad for tensor in group]
        for group in groups
    ]
    wanted: list[Any] = list(chain.from_iterable(map(compress, groups, live)))
    hooked = list(filter(_hooks, wanted))
    with _unhooked(hooked) if hooked else _NOTHING:
        parts = _backward(output, weight, wanted, **options) if wanted else ()
    if isinstance(output, Tensor):  # of a loss; what is dense stays so in products
        _refuse_sparse(parts)
    found = iter(parts)
    return [[next(found) if there else None for there in group] for group in live]


def _refuse_sparse(tensors: Sequence[Tensor | None]) -> None:
    """Refuse gradients that cannot be part of a vector.

    Raises:
        UnsupportedParameter: one is sparse.
    """
    for tensor in tensors:
        if tensor is not None and tensor.layout is not torch.strided:
            raise UnsupportedParameter(
                f"A gradient of shape {tuple(tensor.shape)} is sparse ({tensor.layout}), and "
                "second-order products need dense ones. Leave out sparse=True of nn.Embedding or "
                "nn.EmbeddingBag."
            )


@contextlib.contextmanager
def _unhooked(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Without what ``register_hook`` registered."""
    saved = [(t._backward_hooks, dict(t._backward_hooks or {})) for t in tensors]
    try:
        for hooks, _ in saved:
            hooks.clear()  # type: ignore[union-attr]
        yield
    finally:
        for hooks, known in saved:
            hooks.update(known)  # type: ignore[union-attr]


def _backward(
    output: Any, weight: Any, wanted: Sequence[Tensor], **options: bool
) -> Sequence[Tensor | None]:
    """``autograd.grad``, past its checks in Python where every output has a weight of its shape.

    They cost as much as a small product.
    """
    plain = isinstance(weight, (list, tuple)) and NoneType not in map(type, weight)
    plain = plain and options.keys() <= {"create_graph", "retain_graph"}
    if not plain or torch.overrides.has_torch_function((*output, *wanted)):
        return torch.autograd.grad(output, wanted, weight, allow_unused=True, **options)
    create = options.get("create_graph", False)
    keep = options.get("retain_graph", create)
    return torch.autograd.graph._engine_run_backward(
        tuple(output), tuple(weight), keep, create, tuple(wanted), True,
        accumulate_grad=False,
    )  # fmt: skip


def pulled(
    outputs: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    *groups: Sequence[Tensor | None],
    **options: bool,
) -> list[list[Tensor | None]]:
    """`gradients` of those outputs that are there, have a graph and a weight."""
    pairs = [
        (output, weight)
        for output, weight in zip(outputs, weights, strict=True)
        if output is not None and weight is not None and output.requires_grad
    ]
    if not pairs:
        return [[None] * len(group) for group in groups]
    live, seeds = map(list, zip(*pairs, strict=True))
    return gradients(live, seeds, *groups, **options)


def added(
    total: Sequence[Tensor | None], parts: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Sums, where what is missing is zero; an empty total is zero."""
    return [
        part if known is None else known if part is None else known + part
        for known, part in zip(total or [None] * len(parts), parts, strict=True)
    ]
