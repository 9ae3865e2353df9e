"""Iterative differentiation (ITD): the gradient of the steps that were really taken.

    ∇Φ_K = d/dx f(x, y_K(x)),    y_{k+1} = Φ_k(y_k, s_k, x),    y_0 constant

by going back over the recorded steps (see `torch_bilevel.inner.replay`). With ``window=K`` only
the last K steps are differentiated (truncated back-propagation, Shaban et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .. import _checks
from .._registry import changed, describe
from ..errors import NoInnerStep
from ..inner import Window, check_mismatch, reverse, tolerance
from ..problem import OuterGradients
from .base import Estimate, Estimator, Situation, Wording, rules_of


@dataclass(frozen=True)
class Unrolled(Estimator):
    """Reverse mode through the recorded inner steps.

    Needs: an update rule for the inner optimizer. Costs: one more gradient and one product for
    each step; memory is one iterate a step (parameters and optimizer state) and one step's graph.

    Args:
        window: differentiate the last ``window`` steps; None all since the last outer step.
        checkpoint_every: keep every c-th iterate and step again in between: K/c + √c iterates
            for 1.4 (c = 9) to 2 (c = 50) more gradients a step. ``"auto"`` finds c ≈ √K as the
            steps come.
        iterate_bytes: limit on the bytes of iterates; c is doubled, and kept iterates are thinned
            out, so that they fit.
        offload: where iterates are kept, such as ``"cpu"``; None keeps them in place.
        keep_graph: keep the graphs of your own forward and backward instead of evaluating each step
            again: faster, and memory grows by a step's activations (twice) every step, as in
            `higher` or TorchOpt. For short loops. ``train_loss(...)`` then evaluates without
            ``torch.compile`` and fused attention, and the other tensors it returns are detached.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.Unrolled(window=50, checkpoint_every=7))
        'unrolled(window=50, checkpoint_every=7)'
    """

    window: int | None = None
    checkpoint_every: int | str | None = None
    iterate_bytes: int | None = None
    offload: str | None = None
    keep_graph: bool = False

    name: ClassVar[str] = "unrolled"
    unrolls: ClassVar[bool] = True
    frozen_constant: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.positive_int("Unrolled", "window", self.window, optional=True)
        if self.checkpoint_every != "auto":
            _checks.positive_int(
                "Unrolled", "checkpoint_every", self.checkpoint_every, optional=True
            )
        _checks.positive_int(
            "Unrolled", "iterate_bytes", self.iterate_bytes, optional=True
        )
        if self.offload is not None:
            torch.device(self.offload)  # raises on a name that is not a device
        if self.keep_graph and (self.checkpoint_every or self.iterate_bytes):
            raise ValueError(
                "Unrolled(keep_graph=True) keeps every step, so checkpoint_every= and "
                "iterate_bytes=, which step through the loop again, have nothing to do. Leave out "
                "either."
            )

    def __str__(self) -> str:
        return describe(self.name, changed(self))

    def wording(self, fresh: bool) -> Wording:
        """See `Estimator.wording`."""
        words = super().wording(fresh)
        if self.window is None:
            return words
        return replace(words, batches=f"the last {self.window} steps, in order")

    def new_window(self, max_bytes: int | None) -> Window:
        """A window of iterates."""
        return Window(
            last=self.window,
            iterates=True,
            checkpoint_every=self.checkpoint_every,
            iterate_bytes=self.iterate_bytes,
            offload=self.offload,
            keep_graph=self.keep_graph,
            max_bytes=max_bytes,
        )

    def check(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Refuse optimizers without an update rule."""
        rules_of(optimizers)

    def estimate(self, situation: Situation, outer: OuterGradients) -> Estimate:
        """∇Φ = ∂_x f + Σ_k J_k Ḡ_k + ȳ_0; see `Estimator.estimate`."""
        steps = situation.window.steps(self.window)
        records = list(situation.window)
        earlier = records[: len(records) - len(steps)]
        whole = all(record.replayable for record in records)
        if not records[0].has_iterate or not whole:
            raise NoInnerStep(
                "The steps since the last outer step were recorded for an estimator that keeps "
                "no iterates, so they cannot be unrolled. Set optimizer.estimator = 'unrolled' "
                "before the steps it is to differentiate."
            )
        back = reverse(
            situation.problem,
            steps,
            earlier,
            rules_of(situation.optimizers),
            situation.loop,
            outer.inner,
        )
        numbers = [record.index for record in back.steps]
        bounds = [tolerance(situation.problem, record.calls) for record in back.steps]
        check_mismatch(back.mismatch, numbers, bounds, back.unexplained)
        return Estimate(
            gradient=outer.outer
            + back.outer
            + situation.problem.from_initial(back.inner),
            reached=[a or b for a, b in zip(outer.reached, back.reached, strict=True)],
            steps=len(steps),
        )
