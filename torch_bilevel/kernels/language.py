"""Triton, where it is installed, and when a kernel can run.

Kernels are written for Triton 3.6 to 3.9: pointer arithmetic only, no block pointers, no libdevice,
no inline assembly. With ``TRITON_INTERPRET=1`` in the environment before this package is imported
they run on the CPU, in Python, which is how the tests check them.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS, a CPU build of PyTorch
    triton = tl = None  # type: ignore[assignment]

F = TypeVar("F", bound=Callable[..., Any])
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
DTYPES = {} if tl is None else {torch.float32: tl.float32, torch.float64: tl.float64}
INTERPRETED_PROGRAMS = 3  # enough for partial results to be summed


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``; where Triton is missing the function as it is, never to be called."""
    return function if triton is None else triton.jit(function)


class Tuned:
    """A kernel compiled with the fastest of several configurations, timed once per key and dtypes.

    The choice is kept on disk. Another choice sums in another order; under
    ``torch.use_deterministic_algorithms(True)`` it is always the first, and so are the bits.

    Args:
        function: the jitted kernel.
        configurations: meta-parameters, with ``num_warps`` and ``num_stages``.
        key: arguments of the kernel that a choice is made anew for.
    """

    def __init__(
        self,
        function: Any,
        configurations: Sequence[dict[str, int]],
        key: Sequence[str],
    ):
        self.function, self.configurations = function, configurations
        self.tuner: Any = None
        if triton is not None and not INTERPRETED and len(configurations) > 1:
            made = []
            for given in configurations:
                meta = {k: v for k, v in given.items() if not k.startswith("num_")}
                options = {k: v for k, v in given.items() if k.startswith("num_")}
                made.append(triton.Config(meta, **options))
            self.tuner = triton.autotune(made, list(key), cache_results=True)(function)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        if self.tuner is not None and not torch.are_deterministic_algorithms_enabled():
            return self.tuner[grid]
        return functools.partial(self.function[grid], **self.configurations[0])


def unavailable(tensor: Tensor) -> str | None:
    """Why no kernel can run on a tensor, or None."""
    if triton is None:
        return "Triton is not installed"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"Triton {triton.__version__} is installed, and 3.6 is needed"
    if torch._C._are_functorch_transforms_active():
        return "a function transform (vmap, jvp, ...) is active"
    if INTERPRETED:
        return None
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) < (
        8,
        0,
    ):
        return "the GPU is older than compute capability 8.0"
    return None


def launcher(function: F) -> F:
    """Launches go to the device and stream of the first tensor, not to the current device's."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        parts = (t for a in args for t in (a if isinstance(a, tuple) else (a,)))
        first = next(part for part in parts if isinstance(part, Tensor))
        with torch.cuda.device_of(first):
            return function(*args, **options)

    return call  # type: ignore[return-value]


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products of a solver's own, not in TF32, whatever the user allows their model."""
    if device.type != "cuda" or not tf32():
        yield
        return
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = "tf32"


def tf32() -> bool:
    """Whether the user lets matrix products be rounded to TF32, whichever flag said so.

    ``allow_tf32`` cannot be read once ``fp32_precision`` was written.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def programs(tensor: Tensor, most: int, per_processor: int = 1) -> int:
    """How many programs to launch: what runs at once on the device, and no more than ``most``."""
    if tensor.device.type != "cuda":
        return max(1, min(most, INTERPRETED_PROGRAMS))
    processors = torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return max(1, min(most, per_processor * processors))


def shared_memory(tensor: Tensor) -> int:
    """Bytes a program can have on the device."""
    if tensor.device.type != "cuda":
        return 2**20
    properties = torch.cuda.get_device_properties(tensor.device)
    return getattr(properties, "shared_memory_per_block_optin", 0)


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def padded(size: int, least: int = 1) -> int:
    """The next power of two, what Triton's blocks must be."""
    return max(least, 1 << max(size - 1, 0).bit_length())
