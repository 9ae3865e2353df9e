"""What is particular to one loss: its formulas, row by row."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

KEEP = 2**24  # entries of z; the state of more is computed again


@dataclass(frozen=True)
class Link(abc.ABC):
    """The formulas of one loss ℓ(z, t), and who computes them; arrays are class-major, (c, n).

    ℓ is one number per example, (n,), or, ``elementwise``, one per output, (c, n). *State*: what
    the other formulas need of z, (c, n). Only losses with real targets have the last four.
    """

    kernel: str = "torch"  # as `fused.resolve` found it

    elementwise: ClassVar[bool] = False
    plain: ClassVar[Any] = (
        None  # the same loss in torch.nn.functional, of z (n, c) and t
    )
    kind: ClassVar[int | None] = None  # in kernels; None where they do not know it
    smoothing: ClassVar[float] = 0.0

    @abc.abstractmethod
    def value(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """ℓ and the state."""

    def losses(self, z: Tensor, t: Tensor) -> Tensor:
        """ℓ alone, by operations that autograd differentiates."""
        return self.value(z, t)[0]

    @abc.abstractmethod
    def residual(self, state: Tensor, t: Tensor) -> Tensor:
        """The residual r = ∂_z ℓ."""

    @abc.abstractmethod
    def along(self, state: Tensor, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """⟨r, u⟩, of the shape of ℓ, and ℓ_zz u."""

    def target(self, state: Tensor, t: Tensor) -> Tensor:
        """ℓ_t."""
        raise NotImplementedError

    def mixed(self, state: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """ℓ_zt v."""
        raise NotImplementedError

    def mixed_transpose(self, state: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """ℓ_tz u."""
        raise NotImplementedError

    def target_curvature(self, v: Tensor) -> Tensor:
        """ℓ_tt v."""
        return torch.zeros_like(v)
