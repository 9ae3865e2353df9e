"""A program of tensor operations, recorded once: cleaned, and split by what depends on v.

    prefix(inputs)          -> loss, and every value the product needs of the point
    product(values, v)      -> H v, J v

The prefix runs once per point, the product once per v. Both are plain graphs: no autograd, hence no
double backward of anything that is compiled.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.expand.default}
_SAME = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default}


def record(
    function: Callable[..., Any], inputs: Sequence[Tensor]
) -> tuple[GraphModule, list[Tensor]]:
    """The operations of a function, in-place ones turned into pure ones.

    Args:
        function: of the inputs; may use other tensors, leaves with and without gradient.
        inputs: example values.

    Returns:
        The graph, whose further inputs stand for the other tensors, and those tensors.
    """
    first = make_fx(function)(*inputs)
    others = _lift(first)
    pure = make_fx(torch.func.functionalize(first, remove="mutations"))(
        *inputs, *(t.detach() for t in others)
    )
    more = _lift(pure)  # constants that were made while recording
    _clean(pure.graph)
    pure.recompile()
    return pure, [*others, *more]


def _lift(module: GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that a graph holds."""
    graph, found = module.graph, {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = operator.attrgetter(str(node.target))(module)
        if id(tensor) not in found:
            with graph.inserting_after(last):
                last = graph.placeholder(f"other_{len(found)}")
            found[id(tensor)] = (last, tensor)
        node.replace_all_uses_with(found[id(tensor)][0])
        graph.erase_node(node)
    module.recompile()
    return [tensor for _, tensor in found.values()]


def _clean(graph: Graph) -> None:
    """Drop identities, transposes of transposes, repeated and unused operations."""
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        node.target = _DRAWN.get(node.target, node.target)
        args = node.args
        if node.target in _SAME or _reshapes_nothing(node):
            node.replace_all_uses_with(args[0])
        elif node.target is aten.t.default and args[0].target is aten.t.default:  # type: ignore[union-attr]
            node.replace_all_uses_with(args[0].args[0])  # type: ignore[union-attr]
        elif not _random(node):
            key = node.target, _key(args), _key(node.kwargs)
            known = seen.setdefault(key, node)
            if known is not node:
                node.replace_all_uses_with(known)
    _drop_unused(graph)


def _reshapes_nothing(node: Node) -> bool:
    """A view of the shape that its input has."""
    if node.target not in _VIEWS or not isinstance(node.args[0], Node):
        return False
    before, after = (n.meta.get("val") for n in (node.args[0], node))
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    return before.shape == after.shape and before.dtype == after.dtype


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


def split(
    module: GraphModule, vector: int, results: Sequence[int]
) -> tuple[GraphModule, list[Node], list[Node]]:
    """Separate what does not depend on one input.

    Args:
        module: a recorded graph that returns a tuple.
        vector: the number of the input, v.
        results: which of its outputs are values of the point.

    Returns:
        The prefix, which returns those outputs and then what the product needs; the nodes that
        stand for the latter; the nodes that depend on v, in order.
    """
    graph = module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    moving: set[Node] = {inputs[vector]}
    for node in graph.nodes:
        if node.op == "call_function" and moving & set(node.all_input_nodes):
            moving.add(node)
    (output,) = (node for node in graph.nodes if node.op == "output")
    needed = dict.fromkeys(
        source
        for node in graph.nodes
        if node in moving
        for source in node.all_input_nodes
        if source not in moving
    )
    for value in output.args[0]:
        if isinstance(value, Node) and value not in moving:
            needed[value] = None
    prefix = Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op != "output" and (node not in moving or node.op == "placeholder"):
            copies[node] = prefix.node_copy(node, copies.__getitem__)
    kept = list(needed)
    returned = [output.args[0][index] for index in results]
    prefix.output(tuple(copies[node] for node in [*returned, *kept]))
    _drop_unused(prefix)
    order = [node for node in graph.nodes if node in moving]
    return GraphModule(module, prefix), kept, order


def _drop_unused(graph: Graph) -> None:
    for node in reversed(list(graph.nodes)):  # what draws stays: others draw after it
        if node.op == "call_function" and not node.users and not _random(node):
            graph.erase_node(node)


def product(
    module: GraphModule,
    kept: Sequence[Node],
    order: Sequence[Node],
    results: Sequence[int],
) -> GraphModule:
    """The graph of some outputs as a function of v and the kept values of the point."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    graph = Graph()
    copies: dict[Node, Node] = {order[0]: graph.placeholder("v")}
    for number, node in enumerate(kept):
        copies[node] = graph.placeholder(f"value_{number}")
    for node in order[1:]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[output.args[0][index]] for index in results))
    _drop_unused(graph)
    return GraphModule(module, graph)
