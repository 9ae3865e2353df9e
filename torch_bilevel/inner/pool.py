"""Buffers for iterates: a copy into warm memory costs a tenth of a fresh clone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Pool:
    """Buffers for iterates, reused from one window to the next.

    On the CPU they are carved from slabs above the allocator's mmap threshold (32 MiB in glibc):
    pages are resident once they are written, and buffers that outlive the step do not fragment
    the heap that activations come from.

    Args:
        device: where they live; None keeps each where its source is.
    """

    SLAB = 33 * 2**20

    def __init__(self, device: str | None = None):
        self.device = device
        self.free: dict[tuple, list[Tensor]] = {}
        self.allocated = 0
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def copy(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Copies of the tensors in buffers of the pool."""
        buffers = []
        for source in sources:
            device = torch.device(self.device or source.device)
            shelf = self.free.get((source.shape, source.dtype, device))
            buffers.append(shelf.pop() if shelf else self._new(source, device))
        if buffers:
            torch._foreach_copy_(buffers, [source.detach() for source in sources])
        return buffers

    def _new(self, source: Tensor, device: torch.device) -> Tensor:
        size = source.numel() * source.element_size()
        self.allocated += size
        if device.type != "cpu":
            return torch.empty(source.shape, dtype=source.dtype, device=device)
        if self._used + size > self._slab.numel():
            self._slab = torch.empty(max(self.SLAB, size), dtype=torch.uint8)
            self._used = 0
        piece = self._slab[self._used : self._used + size]
        self._used += -(-size // 64) * 64  # the next starts aligned
        return piece.view(source.dtype).view(source.shape)

    def give_back(self, buffers: Sequence[Tensor]) -> None:
        """Return buffers for reuse."""
        for buffer in buffers:
            key = (buffer.shape, buffer.dtype, buffer.device)
            self.free.setdefault(key, []).append(buffer)
