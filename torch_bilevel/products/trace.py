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

from .simplify import call_directly, clean, drop_unused, merge


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
    clean(pure.graph)
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
    drop_unused(prefix)
    call_directly(prefix)
    order = [node for node in graph.nodes if node in moving]
    return GraphModule(module, prefix), kept, order


def product(
    module: GraphModule,
    kept: Sequence[Node],
    order: Sequence[Node],
    results: Sequence[int],
) -> GraphModule:
    """The graph of some outputs as a function of v and the kept values of the point."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    graph = Graph()
    copies: dict[Node, Node] = {}
    names = ("v", *(f"value_{number}" for number in range(len(kept))))
    for name, node in zip(names, (order[0], *kept), strict=True):
        copies[node] = graph.placeholder(name)
        copies[node].meta.update(node.meta)
    for node in order[1:]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[output.args[0][index]] for index in results))
    drop_unused(graph)
    merge(graph)
    call_directly(graph)
    return GraphModule(module, graph)
