"""One flat vector for a list of tensors.

Solvers and estimators see the inner and the outer variables as one 1-D tensor each. A `Layout`
owns the correspondence: names, shapes, dtypes and devices of the parts, dtype and device of
the vector. Vectors are at least float32, so bfloat16 parameters get float32 solver arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property, reduce

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ._transforms import may_look


class Layout:
    """How a list of tensors lies in one flat vector.

    Args:
        tensors: the parts, in order; only their metadata is kept.
        names: one name per part, used in messages.

    Attributes:
        paired: parts are to begin at even places in memory, for they are read as complex numbers.
    """

    def __init__(self, tensors: Sequence[Tensor], names: Sequence[str]):
        self.names = tuple(names)
        self.shapes = tuple(tensor.shape for tensor in tensors)
        self.dtypes = tuple(tensor.dtype for tensor in tensors)
        self.devices = tuple(tensor.device for tensor in tensors)
        self.sizes = [tensor.numel() for tensor in tensors]
        self.numel = sum(self.sizes)
        self.dtype = reduce(torch.promote_types, self.dtypes, torch.float32)
        self.device = self.devices[0] if tensors else torch.device("cpu")
        even = {*self.dtypes} == {self.dtype} and {*self.devices} == {self.device}
        # the C++ of PyTorch 2.9 forgets shapes without entries
        self._even = even and all(self.sizes)
        self.paired = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and (
            (self.names, self.shapes, self.dtypes, self.devices)
            == (other.names, other.shapes, other.dtypes, other.devices)
        )

    __hash__ = None  # type: ignore[assignment]

    def flatten(self, parts: Sequence[Tensor | None]) -> Tensor:
        """The parts as one vector of shape ``(numel,)``; a missing part is zero."""
        several = len(parts) > 1  # of one it would be a view
        if self._even and several and all(map(self._fits, parts)) and may_look():
            return _flatten_dense_tensors(parts)  # type: ignore[arg-type]
        flat = [
            torch.zeros(size, dtype=self.dtype, device=self.device)
            if part is None
            else part.reshape(-1).to(self.device, self.dtype)
            for part, size in zip(parts, self.sizes, strict=True)
        ]
        return torch.cat(flat) if flat else self.zeros()

    def add(self, vector: Tensor, parts: Sequence[Tensor | None]) -> None:
        """Add the parts to a vector in place; a missing part is zero."""
        pieces = torch.split(vector, self.sizes)
        for piece, part in zip(pieces, parts, strict=True):
            if part is not None:
                piece += part.reshape(-1).to(self.device, self.dtype)

    def split(self, vector: Tensor) -> list[Tensor]:
        """The vector as parts of the recorded shapes, dtypes and devices."""
        if not self.paired:
            return self._split(vector)
        # by the sizes, for a part that a transform has wrapped does not tell
        starts = itertools.accumulate(self.sizes, initial=0)
        return [
            part.clone() if start % 2 else part
            for start, part in zip(starts, self._split(vector), strict=False)
        ]

    def _split(self, vector: Tensor) -> list[Tensor]:
        constant = (
            not vector.requires_grad
        )  # the derivative fills a vector for each part
        if self._even and constant and self._fits(vector) and may_look():
            return list(_unflatten_dense_tensors(vector, self._templates))
        # the derivative of a split is a copy, which one part can do without
        whole = len(self.sizes) == 1
        pieces = (vector,) if whole else torch.split(vector, self.sizes)
        return [
            piece.reshape(shape).to(device, dtype)
            for piece, shape, dtype, device in zip(
                pieces, self.shapes, self.dtypes, self.devices, strict=True
            )
        ]

    @cached_property
    def _templates(self) -> list[Tensor]:
        """Of the shapes of the parts, without data."""
        return [torch.empty(shape, device="meta") for shape in self.shapes]

    def _fits(self, part: Tensor | None) -> bool:
        """Whether it is there, in the dtype and on the device of the vector."""
        return (
            part is not None and part.dtype is self.dtype and part.device == self.device
        )

    def zeros(self) -> Tensor:
        """A zero vector of this layout."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)
