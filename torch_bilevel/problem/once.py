"""Operations of PyTorch that can be differentiated only once: how to recognise them, the way round.

Most raise when they are differentiated twice, each in its own words. One kind does not: the node
that ``once_differentiable`` leaves in the graph raises only if something differentiable lies behind
it, and as nothing does, that part of H v and J v would silently be zero. Its graph is looked
through, once for every function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..errors import NoSecondDerivative

_MESSAGES = re.compile(
    r"does not currently support double backward|derivative for|is not implemented"
    r"|not differentiable twice|marked with @once_differentiable"
    r"|trying to differentiate twice|checkpoint is incompatible with \.grad"
    r"|no autograd formula was registered|_nested_tensor|Trying to use forward AD"
    r"|implement the jvp function|Nested forward mode AD|set a forward gradient"
)
_WAYS_ROUND = {
    "embedding_bag": "nn.EmbeddingBag: nn.Embedding, and the mean, sum or max of its rows",
    "cdist": "torch.cdist: the expanded square, (‖a‖² + ‖b‖² − 2 a·b).sqrt()",
    "pdist": "F.pdist: differences of pairs of rows, x[i] - x[j] with torch.triu_indices",
    "ctc_loss": "F.ctc_loss: the forward algorithm written with logsumexp",
    "hardsigmoid": "F.hardsigmoid: F.relu6(x + 3) / 6",
    "multi_margin": "F.multi_margin_loss: margins written with gather and clamp",
    "multilabel_margin": "F.multilabel_margin_loss: margins written with gather and clamp",
    "standard_gamma": "Gamma.rsample (_standard_gamma): samples without gradient",
    "irichlet": "Dirichlet.rsample: samples without gradient",
    "checkpoint": "torch.utils.checkpoint: pass use_reentrant=False",
    "no autograd formula": "a custom operator: register_autograd with differentiable operations",
    "nested_tensor": "nested tensors: padded ones with a mask",
    "forward AD": "an operation without forward derivative: products='double_backward'",
    "forward mode": "forward mode inside the loss: products='double_backward'",
    "forward gradient": "an operation without forward derivative: products='double_backward'",
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


def refuse_once_differentiable(
    parts: Iterable[Tensor | None], loss: Tensor, name: str
) -> None:
    """Look for what would be left out of second derivatives without an error.

    Args:
        parts: ∇_y g with its graph.
        loss: g with its graph.
        name: of the loss.

    Raises:
        NoSecondDerivative: a function on the way is differentiable once only.
    """
    if not any(type(node).__name__ == "Error" for node in _nodes(parts)):
        return
    found = {type(node)._forward_cls for node in _nodes([loss]) if _custom(node)}
    names = sorted({cls.__name__ for cls in found})
    raise NoSecondDerivative(
        _message(
            f"{name!r} uses a function marked with @once_differentiable (custom functions in its "
            f"graph: {', '.join(names)})."
        )
    )


def _custom(node: Any) -> bool:
    return hasattr(type(node), "_forward_cls")


def _nodes(tensors: Iterable[Tensor | None]) -> Iterable[Any]:
    """Every node of the graphs of some tensors."""
    stack = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [parent for parent, _ in node.next_functions]
