"""A linear map as a fixed program, for what replays programs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Program:
    """v ↦ A v as nothing but launches on the device, the same for every map of its kind.

    Attributes:
        key: what the program is; equal keys mean the same launches for inputs of the same shapes.
        run: v, *inputs ↦ A v.
        inputs: of this map, all on one device: a graph reads memory, not numbers of the host.
        graphs: what was captured of such programs; lives as long as the program is known.
        launched: to be told how many products were.
    """

    key: Hashable
    run: Callable[..., Tensor]
    inputs: list[Tensor]
    graphs: dict[Any, Any] = field(default_factory=dict)
    launched: Callable[[int], None] = lambda count: None


def number(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number on a device, where a graph can read it; without waiting."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)
