"""Tensors that a function reaches by closure, made arguments.

A module's parameters, or tensors of the surrounding program, are named once. While the function is
evaluated, every operation that is given one of them is given another tensor instead, so that it is
a pure function of them, for autograd and for transforms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import UnsupportedParameter


class _Replacing(TorchFunctionMode):
    """Operations see other tensors in place of some."""

    def __init__(self, others: dict[int, Tensor]):
        super().__init__()
        self.others = others

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args = tuple(self._other(arg) for arg in args)
        kwargs = {key: self._other(arg) for key, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)

    def _other(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return self.others.get(id(arg), arg)
        if type(arg) in (list, tuple):
            return type(arg)(self._other(part) for part in arg)
        return arg


class Named:
    """The tensors that were named.

    Args:
        parameters: a module, a tensor, or any pytree or iterable of them.
        owner: who asks, in messages.

    Raises:
        UnsupportedParameter: there is something else among them.
    """

    def __init__(self, parameters: Any, owner: str):
        found: dict[int, Tensor] = {}
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        if isinstance(parameters, Iterable) and not isinstance(
            parameters, (Tensor, dict, list, tuple)
        ):
            parameters = list(parameters)
        for leaf in pytree.tree_leaves(parameters):
            if isinstance(leaf, nn.Module):
                for module in leaf.modules():
                    for name, p in module.named_parameters(recurse=False):
                        found[id(p)] = p
                        places.setdefault(id(p), []).append((module, name))
            elif isinstance(leaf, Tensor):
                found[id(leaf)] = leaf
            else:
                raise UnsupportedParameter(
                    f"{owner}: parameters= contains a {type(leaf).__name__}; name modules and "
                    "tensors, such as parameters=model or parameters=[a, b]."
                )
        self.tensors = list(found.values())
        self.places = [places.get(key, []) for key in found]

    def replaced_by(self, tensors: Sequence[Tensor]) -> Any:
        """A region in which operations see these tensors in their place."""
        if not self.tensors:
            return contextlib.nullcontext()
        others = {}
        for old, places, new in zip(self.tensors, self.places, tensors, strict=True):
            others[id(old)] = new
            # what stands there now: functional_call may have come or gone since
            others.update((id(getattr(*place)), new) for place in places)
        return _Replacing(others)
