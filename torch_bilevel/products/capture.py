"""What can go wrong when a program is recorded, and its replay as a CUDA graph."""

from __future__ import annotations

import contextlib
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureFailed
from ..solvers import capture, copy_all


def failed(name: str, error: Exception) -> CaptureFailed:
    """The error with the line of the user's program where recording stopped."""
    frames = traceback.extract_tb(error.__traceback__)
    own = ("/torch/", "/torch_bilevel/", "<eval_with_key>", "importlib")
    users = [f for f in frames if not any(part in f.filename for part in own)]
    where = ""
    if users:
        last = users[-1]
        where = f" at {last.filename}:{last.lineno}: {last.line!r}"
    why = str(error).strip().splitlines() or [type(error).__name__]
    return CaptureFailed(
        f"{name!r} could not be recorded for products='traced'{where}. {why[0]} {_advice(why[0])}"
    )


def supported(asked: bool | None, device: torch.device) -> bool:
    """Whether products are replayed as a CUDA graph.

    Raises:
        CaptureFailed: it was asked for and there is no CUDA device.
    """
    if device.type == "cuda":
        return asked is not False
    if asked:
        raise CaptureFailed(
            f"cuda_graph=True and the inner parameters are on {device}: CUDA graphs need a CUDA "
            "device. Leave the option out."
        )
    return False


def _advice(why: str) -> str:
    if "tracing tensor" in why or "data-dependent" in why:
        return (
            "Control flow that depends on the values of tensors (if, while, .item(), "
            "bool(tensor)) cannot be recorded: write it with torch.where, or use "
            "products='double_backward'."
        )
    return "Use products='double_backward'."


@contextlib.contextmanager
def uncompiled_functions() -> Iterator[None]:
    """Compiled functions are recorded as the Python they were compiled from."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch._dynamo.config.patch(error_on_nested_fx_trace=False):  # type: ignore[attr-defined]
        yield


class CapturedProduct:
    """v ↦ run(v, *values), replayed: one launch from the host for all of its kernels.

    The graph reads the values of a point from memory of its own; those of another point are copied
    there first.

    Args:
        run: the product.
        v: an example.
        values: of a point.
    """

    def __init__(self, run: Callable[..., Any], v: Tensor, values: Sequence[Tensor]):
        self.v, self.values = v.clone(), [value.clone() for value in values]
        self.results: tuple[Tensor, ...] = ()
        self.at: weakref.ref | None = None

        def launch() -> None:
            self.results = run(self.v, *self.values)

        self.graph = capture(launch, v.device, "product")

    def __call__(
        self, v: Tensor, point: Any, values: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """The product at a point; its results are copies.

        Args:
            v: the direction.
            point: whose values they are.
            values: of the point.
        """
        if self.at is None or self.at() is not point:
            copy_all(self.values, list(values))
            self.at = weakref.ref(point)
        self.v.copy_(v)
        self.graph.replay()
        return tuple(result.clone() for result in self.results)
