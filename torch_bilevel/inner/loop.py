"""What the user declared about the inner loop, beside its losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BilevelError
from .hyperparameters import Hyperparameters
from .transforms import GradientTransform


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
class Rates:
    """Learned factors ρ of the gradients, entry by entry: g ← ρ ∘ g before the step.

    Attributes:
        values: one tensor per inner parameter, of its shape; outer variables.
    """

    values: Sequence[Tensor]

    @torch.no_grad()
    def scale(
        self, optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]
    ) -> None:
        """Multiply the gradients an optimizer is about to consume.

        Args:
            optimizer: one of the inner optimizers.
            tensors: the inner parameters, in the order of the rates.

        Raises:
            BilevelError: parameters were added that have no rate.
        """
        if len(tensors) != len(self.values):
            raise BilevelError(
                f"There are {len(self.values)} learned rates for {len(tensors)} inner parameters: "
                "a parameter group was added after construction. Construct the optimizer anew."
            )
        rates = dict(zip(map(id, tensors), self.values, strict=True))
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(rates[id(p)])


@dataclass(frozen=True)
class Loop:
    """What the user declared about the inner loop.

    Attributes:
        transform: what happens to gradients between ``backward()`` and ``step()``.
        hyperparameters: the function that determines hyperparameters.
        rates: learned factors, by which the library multiplies after the transform.
        proximal: a proximal term, which the library adds after that.
        smoothness: gives constants of the losses at the present outer variables.
    """

    transform: GradientTransform | None = None
    hyperparameters: Hyperparameters | None = None
    rates: Rates | None = None
    proximal: Proximal | None = None
    smoothness: Callable[[], Any] | None = None

    @property
    def transforms(self) -> bool:
        """Whether gradients are changed by a function that is to be differentiated."""
        return self.transform is not None or self.rates is not None

    def transformed(
        self,
        gradients: Sequence[Tensor | None],
        present: Sequence[bool],
        like: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """The gradients that were present, after the transform and the rates.

        Args:
            gradients: ∇_y g per inner parameter, None where no call reaches it.
            present: per parameter, whether the optimizer saw a gradient.
            like: the parameters.
        """
        used = [
            (torch.zeros_like(p) if g is None else g) if there else None
            for g, there, p in zip(gradients, present, like, strict=True)
        ]
        if self.transform is not None:
            # copies, for it may work in place, which leaves refuse
            changed = iter(self.transform([g.clone() for g in used if g is not None]))
            used = [None if g is None else next(changed) for g in used]
        if self.rates is not None:
            used = [
                None if g is None else g * rate.to(g)
                for g, rate in zip(used, self.rates.values, strict=True)
            ]
        return used

    def consumed(
        self,
        gradients: Sequence[Tensor | None],
        present: Sequence[bool],
        values: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """The gradients a step consumes: those present, transformed, with the proximal term."""
        used = self.transformed(gradients, present, values)
        if self.proximal is None:
            return used
        return [
            None if g is None else torch.add(g, v - a, alpha=self.proximal.weight)
            for g, v, a in zip(used, values, self.proximal.anchor, strict=True)
        ]
