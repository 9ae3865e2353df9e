"""Where a model ends and its loss begins.

Gauss–Newton products linearise the model and keep the curvature of what comes after its outputs.
`model_output` marks them; the losses of ``torch.nn.functional`` that are convex in their first
argument, and the operations of this package, mark theirs by themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

_cutters: list[Callable[[Tensor], Tensor]] = []
_fusing: list[bool] = []


def cutting() -> bool:
    """Whether outputs are being cut off."""
    return bool(_cutters)


@contextlib.contextmanager
def cut_by(function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Model outputs pass through a function.

    Args:
        function: gets the outputs, gives what the loss is to see.
    """
    _cutters.append(function)
    try:
        yield
    finally:
        _cutters.pop()


@contextlib.contextmanager
def always_fused() -> Iterator[None]:
    """The operations use their formulas at every size: where the program is recorded."""
    _fusing.append(True)
    try:
        yield
    finally:
        _fusing.pop()


def fusing() -> bool:
    """Whether operations use their formulas at every size."""
    return bool(_fusing)


def model_output(z: Tensor) -> Tensor:
    """Mark the outputs of a model, for Gauss–Newton products; else the identity.

    Only needed where the loss is not one of ``torch.nn.functional`` that says so itself
    (`cross_entropy`, `mse_loss`, ...), or where another split is wanted.

    Args:
        z: the outputs, of any shape, in which what follows is convex.

    Returns:
        The same tensor.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> z = torch.ones(3)
        >>> tb.model_output(z) is z
        True
    """
    return _cutters[-1](z) if _cutters else z
