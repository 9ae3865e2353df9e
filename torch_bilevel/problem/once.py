"""Operations of PyTorch that can be differentiated only once: how to recognise them, the way round.

Most raise when they are differentiated twice, each in its own words. One kind does not: what
``once_differentiable`` leaves in the graph leads nowhere, so that part of H v and J v would
silently be zero. The graph of every loss is looked through for it, once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Set
from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import NoSecondDerivative

_MESSAGES = re.compile(
    r"does not currently support double backward|derivative for .* is not implemented"
    r"|not differentiable twice|marked with @once_differentiable"
    r"|trying to differentiate twice|checkpoint is incompatible with \.grad"
    r"|no autograd formula was registered|_nested_tensor|Trying to use forward AD"
    r"|ZeroTensors are immutable|implement the jvp function|Nested forward mode AD"
    r"|set a forward gradient"
)
_WAYS_ROUND = {
    "embedding_bag": "nn.EmbeddingBag: nn.Embedding, and the mean, sum or max of its rows",
    "cdist": "torch.cdist: the expanded square, (‖a‖² + ‖b‖² − 2 a·b).sqrt()",
    "pdist": "F.pdist: differences of pairs of rows, x[i] - x[j] with torch.triu_indices",
    "ctc_loss": "F.ctc_loss: the forward algorithm written with logsumexp",
    "grid_sampler": "F.grid_sample: PyTorch 2.13, which has it (2.11 has not)",
    "hardsigmoid": "F.hardsigmoid: F.relu6(x + 3) / 6",
    "multi_margin": "F.multi_margin_loss: margins written with gather and clamp",
    "multilabel_margin": "F.multilabel_margin_loss: margins written with gather and clamp",
    "standard_gamma": "Gamma.rsample (_standard_gamma): samples without gradient",
    "irichlet": "Dirichlet.rsample: samples without gradient",
    "checkpoint": "torch.utils.checkpoint: pass use_reentrant=False",
    "no autograd formula": "a custom operator: register_autograd with differentiable operations",
    "nested_tensor": "nested tensors: padded ones with a mask",
    "forward AD": "an operation without forward derivative: products='double_backward'",
    "Nested forward": "forward mode inside the loss: products='double_backward'",
    "forward gradient": "an operation without forward derivative: products='double_backward'",
    "ZeroTensors": "an operation (F.mse_loss) without forward derivative of its backward: "
    "products='double_backward'",
    "jvp function": "a function without jvp: products='double_backward'",
}
_CUSTOM = (
    "a custom autograd.Function: write its backward with differentiable operations, without "
    "once_differentiable"
)


def raise_if_no_second_derivative(error: RuntimeError) -> None:
    """Rewrite PyTorch's message about a missing second derivative.

    Raises:
        NoSecondDerivative: if that is what ``error`` is about.
    """
    text = str(error)
    if not isinstance(error, NoSecondDerivative) and _MESSAGES.search(text):
        raise NoSecondDerivative(_message(text.strip())) from error


def _message(text: str) -> str:
    ways = [way for word, way in _WAYS_ROUND.items() if word in text]
    return (
        f"An operation of the model has no second derivative in PyTorch: {text}\n"
        f"The way round: {'; '.join(ways) or _CUSTOM}. Or products='finite_difference', which "
        "needs one derivative only."
    )


_ONCE = once_differentiable(lambda ctx: None).__code__


def refuse_once_differentiable(
    parts: Iterable[Tensor | None], losses: Sequence[Tensor], name: str, inner: Set[int]
) -> None:
    """Look for what would be left out of second derivatives without an error.

    Args:
        parts: ∇_y g with its graph.
        losses: g, and where its graph is cut what it is cut from, with their graphs.
        name: of the loss.
        inner: ids of the inner parameters; what does not depend on them is no matter.

    Raises:
        NoSecondDerivative: a function on the way is differentiable once only.
    """
    nodes = nodes_of(losses)
    names = {
        type(node)._forward_cls.__name__
        for node in _above(nodes, inner)
        if _is_once_differentiable(node)
    }
    if not names and any(type(node).__name__ == "Error" for node in nodes_of(parts)):
        names = {cls.__name__ for n in nodes if (cls := _custom(n)) is not None}
    if names:
        raise NoSecondDerivative(
            _message(
                f"{name!r} uses a function marked with @once_differentiable "
                f"({', '.join(sorted(names))})."
            )
        )


def _custom(node: Any) -> Any:
    return getattr(type(node), "_forward_cls", None)


def _is_once_differentiable(node: Any) -> bool:
    function = getattr(_custom(node), "backward", None)
    while function is not None:  # other decorators may stand around it
        if getattr(function, "__code__", None) is _ONCE:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _above(nodes: Sequence[Any], inner: Set[int]) -> set[Any]:
    """The nodes that depend on inner parameters."""
    users: dict[Any, list[Any]] = {}
    for node in nodes:
        for parent, _ in node.next_functions:
            users.setdefault(parent, []).append(node)
    stack = [n for n in nodes if id(getattr(n, "variable", None)) in inner]
    found: set[Any] = set()
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += users.get(node, [])
    return found


def nodes_of(tensors: Iterable[Tensor | None]) -> list[Any]:
    """Every node of the graphs of some tensors."""
    stack = [t.grad_fn for t in tensors if t is not None]
    seen: dict[Any, None] = {}
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen[node] = None
            stack += [parent for parent, _ in node.next_functions]
    return list(seen)
