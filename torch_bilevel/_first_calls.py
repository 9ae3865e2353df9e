"""The first call of each vector function of Intel's MKL, on one thread.

MKL before 2025.0 (PyTorch's wheels of 2.13 bundle 2024.2) chooses the code of a function at its
first call; where several threads make that call, one of them may run code of low accuracy, once:
errors up to 1e-3 in the gradient of a step (pytorch#188792). A few numbers never leave one thread.
"""

from __future__ import annotations

import torch

# what ATen/cpu/vml.h hands to MKL
FUNCTIONS = "acos asin atan cos erf erfc erfinv exp log log2 log10 sin sqrt tan tanh trunc".split()


def call_once() -> None:
    """Call each function on a few float32 and float64 numbers; takes 0.2 ms."""
    for dtype in (torch.float32, torch.float64):
        numbers = torch.full((8,), 0.5, dtype=dtype, device="cpu")
        for name in FUNCTIONS:
            getattr(torch, name)(numbers)


call_once()
