"""Fewer and cheaper operations for the same values: what recorded programs go through.

clean          drops what is known without computing: identities, added zeros, repetitions
merge          makes one operation of a matrix product and the sum that it enters
call_directly  names functions of PyTorch; its overloads take 1 to 2 µs more a call
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.expand.default}
_SAME = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default}
_ZEROS = {aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default}
_MERGED = {
    aten.mm.default: aten.addmm.default,
    aten.bmm.default: aten.baddbmm.default,
}
_DIRECT: dict[Any, Callable[..., Any]] = {
    aten.view.default: Tensor.view,
    aten._unsafe_view.default: Tensor.view,
    aten.expand.default: Tensor.expand,
    **{
        getattr(getattr(aten, name), overload): getattr(torch, name)
        for overload, names in {
            "default": "mm bmm addmm baddbmm addcmul t permute unsqueeze cat clone neg exp "
            "_log_softmax_backward_data _softmax_backward_data",
            "Tensor": "add sub mul div",
            "Scalar": "mul div",
            "int": "transpose select",
            "dim_IntList": "sum",
            "dim": "squeeze",
        }.items()
        for name in names.split()
    },
}


def clean(graph: Graph) -> None:
    """Drop identities, sums with zeros, transposes of transposes, repeated and unused operations.

    Args:
        graph: recorded, without in-place operations; changed in place.
    """
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        node.target = _DRAWN.get(node.target, node.target)
        known = _known(graph, node)
        if known is None and not _random(node):
            key = node.target, _key(node.args), _key(node.kwargs)
            known = seen.setdefault(key, node)
        if known is not None and known is not node:
            node.replace_all_uses_with(known)
    drop_unused(graph)


def _known(graph: Graph, node: Node) -> Node | None:
    """A node that has the value of another, if there is one."""
    args: Any = node.args
    if node.target in _SAME or (node.target in _RESHAPES and _alike(node, args[0])):
        return args[0]
    if node.target is aten.t.default and _transposes(args[0]):
        return args[0].args[0]
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    for one, other in (args, args[::-1]):
        if _zero(one) and _alike(node, other):
            return other
    if all(_transposes(arg) and _form(arg) for arg in args):  # Aᵀ + Bᵀ = (A + B)ᵀ
        with graph.inserting_before(node):
            total = _call(graph, node.target, *(arg.args[0] for arg in args))
            whole = _call(graph, aten.t.default, total)
        return whole if _alike(node, whole) else None
    return None


def _call(graph: Graph, target: Any, *args: Node) -> Node:
    """A new operation on dense tensors, with an example of its value, which has no data."""
    node = graph.call_function(target, args)
    examples = [
        torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta")
        for v in (arg.meta["val"] for arg in args)
    ]
    node.meta["val"] = target(*examples)
    return node


def _transposes(value: Any) -> bool:
    return isinstance(value, Node) and value.target is aten.t.default


def _zero(value: Any) -> bool:
    """Zeros of any shape."""
    while isinstance(value, Node) and value.target in _RESHAPES:
        value = value.args[0]
    return isinstance(value, Node) and value.target in _ZEROS


def _alike(a: Node, b: Any) -> bool:
    """Dense tensors of one shape, dtype and layout: views of one are views of the other."""
    one, other = _form(a), _form(b)
    return one is not None and one == other


def _form(node: Any) -> tuple | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    return value.dtype, value.shape, value.stride()


class _Drawn:
    """A tensor like the first argument, filled in its own memory layout as an in-place call would.

    The pure form of such an operation fills a contiguous tensor: other numbers for other elements.
    """

    tags = (torch.Tag.nondeterministic_seeded,)

    def __init__(self, fill: Callable[..., Any]):
        self.fill = fill
        self.__name__ = f"drawn_{fill.__name__}"
        self.__module__ = __name__

    def __call__(self, like: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.fill(torch.empty_like(like), *args, **kwargs)


_DRAWN = {
    aten.bernoulli.p: _Drawn(Tensor.bernoulli_),
    aten.uniform.default: _Drawn(Tensor.uniform_),
    aten.normal_functional.default: _Drawn(Tensor.normal_),
    aten.exponential.default: _Drawn(Tensor.exponential_),
}


def _random(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return (type(value), value) if isinstance(value, (int, float, bool)) else value


def merge(graph: Graph) -> None:
    """One operation for x + A B, where nothing else needs A B: once it is known what is to be run.

    Args:
        graph: cleaned; changed in place.
    """
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        for x, product in (node.args, node.args[::-1]):
            if _enters(product, x, node):
                if x.target is aten.expand.default:  # sums expand by themselves
                    x = x.args[0]
                with graph.inserting_before(node):
                    whole = _call(graph, _MERGED[product.target], x, *product.args)
                node.replace_all_uses_with(whole)
                break
    drop_unused(graph)


def _enters(product: Any, x: Any, total: Node) -> bool:
    """Whether a matrix product is computed for nothing but the sum x + product."""
    if not (isinstance(product, Node) and isinstance(x, Node)):
        return False
    if product.target not in _MERGED or len(product.users) > 1 or x is product:
        return False
    forms = [_form(x), *map(_form, product.args)]
    if None in forms or forms[0][0] != product.meta["val"].dtype:  # type: ignore[index]
        return False
    return _alike(total, product)  # of its shape: x can be expanded to it


def call_directly(graph: Graph) -> None:
    """Call functions of PyTorch in place of overloads of the same signature.

    Args:
        graph: changed in place.
    """
    for node in graph.nodes:
        node.target = _DIRECT.get(node.target, node.target)
        if node.target is aten.slice.Tensor and len(node.args) == 4:
            value, dim, *ends = node.args
            if dim == 0:
                node.target, node.args = operator.getitem, (value, slice(*ends))


def drop_unused(graph: Graph) -> None:
    """Drop what no output needs.

    Args:
        graph: changed in place. What draws random numbers stays: others draw after it.
    """
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not _random(node):
            graph.erase_node(node)
