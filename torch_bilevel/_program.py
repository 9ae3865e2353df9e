"""A linear map as a fixed program, for what replays programs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Program:
    """v ↦ A v as nothing but launches on the device, the same for every map of its kind.

    Attributes:
        key: what the program is; equal keys mean the same launches for inputs of the same shapes.
        run: v, *inputs ↦ A v.
        inputs: of this map.
    """

    key: Hashable
    run: Callable[..., Tensor]
    inputs: list[Tensor]
