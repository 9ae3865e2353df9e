"""What happened in an outer step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

_TENSORS = "loss", "norm", "bound", "residual", "solver_steps"


@dataclass
class Report:
    """One hypergradient. Numbers that live on the device stay there until printed.

    In ``optimizer.history`` those of the CPU are Python numbers; ``float(report.loss)`` reads both.

    Attributes:
        loss: the outer loss, 0-d tensor.
        norm: ‖∇Φ‖, 0-d tensor.
        estimator: the estimator as a string.
        steps: inner steps differentiated, or averaged over for J v.
        hessian_steps: inner steps whose Hessian was used; 0 if none.
        products: Hessian- and cross-products computed.
        seconds: wall time of the estimate.
        zeros: per outer tensor, the fraction of entries whose gradient is exactly zero, 0-d.
        bound: on the error of the hypergradient, where ``certify=True``, 0-d tensor or None.
        residual: ‖∂_y f − H v‖/‖∂_y f‖ of the linear solve, 0-d tensor or None.
        solver_steps: steps of the linear solve, 0-d tensor or None.
        status: how the linear solve ended, or ``""``.
        outer_step: number of the outer step it was used in, from 1; 0 before that.
        notes: approximations and warnings, one phrase each.
    """

    loss: Tensor
    norm: Tensor
    estimator: str
    steps: int
    hessian_steps: int
    products: int
    seconds: float
    zeros: dict[str, Tensor]
    bound: Tensor | None = None
    residual: Tensor | None = None
    solver_steps: Tensor | None = None
    status: str = ""
    outer_step: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [
            f"outer step {self.outer_step}" if self.outer_step else "hypergradient",
            f"loss {float(self.loss):.4g}",
            f"norm {float(self.norm):.3g}",
            self.estimator,
        ]
        if self.bound is not None:
            parts.append(f"error ≤ {float(self.bound):.2g}")
        if self.residual is not None and self.solver_steps is not None:
            parts.append(
                f"residual {float(self.residual):.1e} in {int(self.solver_steps)} steps"
                + (f" ({self.status})" if self.status else "")
            )
            parts.append(f"H of {self.hessian_steps}, J of {self.steps} inner steps")
        else:
            parts.append(f"through {self.steps} inner steps")
        parts += [f"{self.products} products", f"{self.seconds:.3g} s", *self.notes]
        return " · ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for a logger; synchronises."""
        return {
            "loss": float(self.loss),
            "norm": float(self.norm),
            "estimator": self.estimator,
            "steps": self.steps,
            "hessian_steps": self.hessian_steps,
            "products": self.products,
            "seconds": self.seconds,
            "bound": None if self.bound is None else float(self.bound),
            "residual": None if self.residual is None else float(self.residual),
            "solver_steps": None
            if self.solver_steps is None
            else int(self.solver_steps),
            "status": self.status,
            "outer_step": self.outer_step,
            "zeros": {name: float(value) for name, value in self.zeros.items()},
            "notes": list(self.notes),
        }

    def archived(self) -> Report:
        """A copy for the history, with numbers instead of tensors that are on the CPU.

        Small tensors share the heap with the large buffers of training: a thousand of them, one
        in every gap, keep the gaps from being used again (0.6 MiB an outer step with 20,000
        examples of ten classes).
        """
        numbers = {name: _number(getattr(self, name)) for name in _TENSORS}
        zeros = {name: _number(value) for name, value in self.zeros.items()}
        return replace(self, **numbers, zeros=zeros)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The inverse of `as_dict`."""
        plain: dict[str, Any] = {
            k: torch.tensor(v) if k in _TENSORS and v is not None else v
            for k, v in values.items()
        }
        plain["zeros"] = {k: torch.tensor(v) for k, v in values["zeros"].items()}
        return cls(**plain)


def _number(value: Any) -> Any:
    """A number where that waits for no device."""
    on_cpu = isinstance(value, Tensor) and value.device.type == "cpu"
    return value.item() if on_cpu else value
