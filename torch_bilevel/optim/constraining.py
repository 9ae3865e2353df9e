"""Which outer tensor has which constraint, and when it is applied: see `Constraint`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..errors import BilevelError
from ..estimators import Estimator
from .constraints import Constraint, parse
from .levels import parameters


class Constraints:
    """Which outer tensor has which constraint.

    Args:
        given: one for every outer tensor, also those added later; a list with one, or None, for
            each of the present ones; or None.
        outer: the outer optimizer.
        estimator: the estimator.
        names: names of the outer tensors.

    Raises:
        UnknownName: something is no constraint.
        BilevelError: a list has another length, or a proximal map would follow a step that is
            not a plain gradient step.
        ValueError: a tensor has a shape that the constraint cannot have.
    """

    def __init__(
        self,
        given: Any,
        outer: torch.optim.Optimizer,
        estimator: Estimator,
        names: Sequence[str],
    ):
        self._every: Constraint | None = None
        self._own: list[tuple[Tensor, Constraint | None]] = []
        self._fitting: set[int] = set()
        if isinstance(given, (list, tuple)):
            tensors = parameters([outer])
            if len(given) != len(tensors):
                shown = f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
                raise BilevelError(
                    f"constraints= has {len(given)} entries, and the outer optimizer has "
                    f"{len(tensors)} tensors ({shown}). Write one entry for each, in their order, "
                    "None where there is no constraint; or one constraint for all, not in a list."
                )
            found = [None if one is None else parse(one) for one in given]
            self._own = list(zip(tensors, found, strict=True))
        elif given is not None:
            self._every = parse(given)
        self._of = {id(tensor): one for tensor, one in self._own}
        self._any = self._every is not None or any(self._of.values())
        self.check(outer, estimator)

    def pairs(
        self, outer: torch.optim.Optimizer
    ) -> Iterator[tuple[Tensor, Constraint | None, Any]]:
        """(tensor, its constraint, the learning rate of its group), in order."""
        for group in outer.param_groups:
            for tensor in group["params"]:
                yield tensor, self._of.get(id(tensor), self._every), group["lr"]

    def check(self, outer: torch.optim.Optimizer, estimator: Estimator) -> None:
        """Refuse an outer step that could not be followed by the constraints; cheap.

        Raises:
            BilevelError: it is not a plain gradient step, or ends at an extrapolated point.
        """
        if not self._any:
            return
        if estimator.extrapolates:
            raise BilevelError(
                f"constraints= with estimator={str(estimator)!r}: it moves the outer variables on "
                "to an extrapolated point after every outer step, which no constraint would hold "
                f"at. Leave constraints= out, or use {str(getattr(estimator, 'base', 'cg'))!r}."
            )
        for tensor, constraint, _ in self.pairs(outer):
            if constraint is None:
                continue
            if constraint.proximal:
                _checks.plain_sgd(f"constraints={str(constraint)!r}", outer)
            if id(tensor) not in self._fitting:
                constraint.apply(tensor.detach(), 0.0)
                self._fitting.add(id(tensor))

    def apply(self, outer: torch.optim.Optimizer) -> None:
        """After an outer step. A proximal map passes over a tensor that took none (no gradient)."""
        if not self._any:
            return
        skipped = getattr(outer, "found_inf", None)  # fused, under a GradScaler
        if skipped is not None and bool(skipped):
            return
        with torch.no_grad():
            for tensor, constraint, lr in self.pairs(outer):
                if constraint is None or (constraint.proximal and tensor.grad is None):
                    continue
                if isinstance(lr, Tensor):
                    lr = lr.to(tensor.device).reshape(())
                tensor.copy_(constraint.apply(tensor.detach(), lr))

    def describe(self, names: Sequence[str]) -> str:
        """In words, for `BilevelOptimizer.explain`."""
        if self._every is not None:
            return f"{self._every} on every outer tensor"
        own = [f"{n}: {c}" for n, (_, c) in zip(names, self._own, strict=False) if c]
        return ", ".join(own) or "none"
