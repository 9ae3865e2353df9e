"""What the user declared about the inner loop, beside its losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .hyperparameters import Hyperparameters
from .transforms import GradientTransform
from .verification import consumed


@dataclass(frozen=True)
class Proximal:
    """A term (λ/2)‖y − a‖² of the inner objective that is added to the gradients.

    Attributes:
        weight: λ.
        anchor: a: the inner parameters when the trajectory began.
    """

    weight: float
    anchor: list[Tensor]

    def pull(
        self,
        optimizer: torch.optim.Optimizer,
        tensors: Sequence[Tensor],
        scale: Tensor | None,
    ) -> None:
        """Add λ (y − a) to the gradients an optimizer is about to consume.

        Args:
            optimizer: one of the inner optimizers.
            tensors: the inner parameters, in the order of the anchor.
            scale: a factor the gradients still carry (fused optimizers under a GradScaler).
        """
        weight = self.weight if scale is None else self.weight * float(scale)
        anchors = dict(zip(map(id, tensors), self.anchor, strict=True))
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(p.detach() - anchors[id(p)], alpha=weight)


@dataclass(frozen=True)
class Loop:
    """What the user declared about the inner loop.

    Attributes:
        transform: what happens to gradients between ``backward()`` and ``step()``.
        hyperparameters: the function that determines hyperparameters.
        proximal: a proximal term, which the library adds after the transform.
    """

    transform: GradientTransform | None = None
    hyperparameters: Hyperparameters | None = None
    proximal: Proximal | None = None

    def consumed(
        self,
        gradients: Sequence[Tensor | None],
        present: Sequence[bool],
        values: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """The gradients a step consumes: those present, transformed, with the proximal term."""
        used = consumed(gradients, present, values, self.transform)
        if self.proximal is None:
            return used
        return [
            None if g is None else torch.add(g, v - a, alpha=self.proximal.weight)
            for g, v, a in zip(used, values, self.proximal.anchor, strict=True)
        ]
