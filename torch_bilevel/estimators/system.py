"""The linear system of the inner problem's stationary point, shared by implicit estimators.

r(y, x) = s ∘ ∇_y g(x, y) + D ∘ y = 0 is what the inner optimizer comes to rest at: s is the sign
of the update, D its weight decay. Implicit differentiation needs (∂_y r)ᵀ v and (∂_x r)ᵀ v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._program import Program, number
from ..errors import BilevelError, InvalidHyperparameters, SolverLimit
from ..inner import RULES, HyperAdjoint, StepRecord, stationarity
from ..ops import foreseen
from ..problem import BilevelProblem, Point, Sample, WeightedCall
from .base import Situation


def check_declared(situation: Situation) -> None:
    """Refuse what the minimum of the inner problem does not depend on.

    Raises:
        BilevelError: an outer variable is an initialisation that nothing pulls to.
        InvalidHyperparameters: rates are learned.
    """
    if situation.problem.initial and situation.loop.proximal is None:
        raise BilevelError(
            "A parameter is in both optimizers (an initialisation), and the minimum that an "
            "implicit estimator describes does not depend on where the inner loop began. Use "
            "'unrolled', 'forward_gradient' or 'first_order', or pull the inner parameters "
            "to the initialisation: proximal_term=1.0 (iMAML)."
        )
    if situation.loop.rates is not None:
        raise InvalidHyperparameters(
            "optimizer.learn_rates() was called, and the point where an inner optimizer comes "
            "to rest does not depend on rates, so an implicit estimator has no gradient for "
            "them. Use 'unrolled'."
        )


def with_declared(
    situation: Situation,
    step: StepRecord,
    at: System,
    v: Tensor,
    Jv: Tensor,
    reached: list[bool],
) -> tuple[Tensor, list[bool]]:
    """J v with what enters beside the registered losses: learned weight decay, a proximal term.

    Args:
        situation: problem and loop.
        step: the inner step whose hyperparameters are the present ones.
        at: the system v solves.
        v: the adjoint.
        Jv: J v of the losses, flat.
        reached: per outer tensor, whether they depend on it.

    Returns:
        The sum, and which outer tensors it reaches.
    """
    if situation.loop.hyperparameters is not None:
        through, touched = decay_cross(situation, step, v)
        Jv = Jv + through
        reached = [a or b for a, b in zip(reached, touched, strict=True)]
    proximal = situation.loop.proximal
    if proximal is not None:  # a enters r as −λ s ∘ a
        pulled = proximal.weight * at.signed(v)
        Jv = Jv - situation.problem.from_initial(pulled)
        reached = [
            a or direct is None
            for a, direct in zip(reached, situation.problem.direct, strict=True)
        ]
    return Jv, reached


class System:
    """The linear system of the inner optimizer's fixed point, for some calls.

    r(y, x) = s ∘ ∇_y g(x, y) + D ∘ y;    ∂_y r = s ∘ H + D,    ∂_x r = s ∘ Jᵀ

    With a proximal term, D includes its s·λ.

    Args:
        situation: problem and optimizers.
        calls: the weighted calls that define g.
        damping: added to the diagonal.
    """

    def __init__(
        self, situation: Situation, calls: Sequence[WeightedCall], damping: float
    ):
        problem = situation.problem
        self._problem, self._calls = problem, calls
        self.products = situation.products
        known = [s for o in situation.optimizers for s in stationarity(o, RULES)]
        self.frozen = any(item.frozen for item in known)
        one_sign = len({item.sign for item in known}) == 1
        self.is_map = any(call.is_map for call, _ in calls)
        self.symmetric = one_sign and not self.is_map
        self.sign: Tensor | None = None
        self.decay: Tensor | float = damping
        self.damping = damping
        self._proximal = proximal = situation.loop.proximal
        pull = 0.0 if proximal is None else proximal.weight
        if any(item.sign != 1 for item in known):
            self.sign = _spread(problem, [item.sign for item in known])
        # r = s ∘ (∇_y g + λ (y − a)) + D ∘ y: the proximal term is a decay of the loss's sign
        decays = [item.decay + pull * item.sign for item in known]
        numbers = [decay for decay in decays if not isinstance(decay, Tensor)]
        if len(numbers) == len(decays) == numbers.count(numbers[0]):
            self.decay = float(numbers[0]) + damping  # the same for all
        else:
            self.decay = _spread(problem, decays) + damping

    @cached_property
    def linearization(self) -> Point:
        """Products of the loss at the point where it is first asked for."""
        return self.products.linearize(self._problem, self._calls)

    @property
    def residual(self) -> Tensor:
        """r(y, x) at the present point, without damping; zero at a stationary point."""
        y, gradient = self._problem.inner.read(), self.linearization.gradient
        if self._proximal is not None:  # s ∘ λ y is in the decay
            anchor = self._problem.inner.layout.flatten(self._proximal.anchor)
            gradient = gradient - self._proximal.weight * anchor
        return self.signed(gradient) + (self.decay - self.damping) * y

    @property
    def notes(self) -> list[str]:
        """What a report says about the system."""
        held = "decoupled weight decay held at its present preconditioner"
        noted = [] if self.products.note is None else [self.products.note]
        return [*noted, held] if self.frozen else noted

    def forget(self) -> None:
        """Free the graph."""
        self.__dict__.pop("linearization", None)

    def signed(self, v: Tensor) -> Tensor:
        """S ∘ v."""
        return v if self.sign is None else self.sign * v

    def product(self, v: Tensor) -> Tensor:
        """(∂_y r)ᵀ v = H (s ∘ v) + D ∘ v; symmetric when s is one sign throughout."""
        return self._decayed(self.linearization.hvp(self.signed(v)), v)

    def transpose(self, u: Tensor) -> Tensor:
        """∂_y r u = s ∘ (Hᵀ u) + D ∘ u."""
        return self._decayed(self.signed(self.linearization.transpose(u)), u)

    def joint(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """`product` and `cross` from one pass; the loss's too, where it is still to come."""
        v_ = self.signed(v)
        inner = self._problem.inner
        with foreseen(inner.tensors, inner.layout.split(v_)):
            # the product too: activation checkpoints are evaluated again in it
            Hv, Jv = self.linearization.joint(v_)
        return self._decayed(Hv, v), Jv

    def _decayed(self, Hv: Tensor, v: Tensor) -> Tensor:
        if isinstance(self.decay, Tensor):
            return torch.addcmul(Hv, self.decay, v)
        return torch.add(Hv, v, alpha=self.decay) if self.decay else Hv

    def program(self) -> Program | None:
        """`product` as a fixed program, where the engine has one of H."""
        known = self.linearization.program()
        if known is None:
            return None
        sign = self.sign is not None
        decayed = isinstance(self.decay, Tensor) or self.decay != 0
        layout = self._problem.inner.layout
        more = [self.sign] if self.sign is not None else []
        more += [number(self.decay, layout.dtype, layout.device)] if decayed else []

        def run(v: Tensor, *inputs: Tensor) -> Tensor:
            given, rest = inputs[: len(known.inputs)], inputs[len(known.inputs) :]
            Hv = known.run(rest[0] * v if sign else v, *given)
            return torch.addcmul(Hv, rest[-1], v) if decayed else Hv

        return replace(
            known,
            key=(known.key, sign, decayed),
            run=run,
            inputs=[*known.inputs, *more],
        )

    def factors(self, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Point.factors`; D of the optimizer is part of the diagonal."""
        if self.sign is not None:
            raise SolverLimit(
                "'sample_space' does not know maximised parameter groups."
            )
        Z, curved, diagonal = self.linearization.factors(limit)
        return Z, curved, diagonal + self.decay

    def cross(self, v: Tensor) -> Tensor:
        """J (s ∘ v)."""
        return self.linearization.cross(self.signed(v))


def _spread(problem: BilevelProblem, values: Sequence[Any]) -> Tensor:
    """One value per parameter as a flat vector."""
    return problem.inner.layout.flatten(
        [
            value
            if isinstance(value, Tensor)
            else torch.full_like(tensor, value, requires_grad=False)
            for value, tensor in zip(values, problem.inner.tensors, strict=True)
        ]
    )


def mean_cross(
    problem: BilevelProblem, samples: Sequence[Sample], at: System, v: Tensor
) -> tuple[Tensor, list[bool]]:
    """J v averaged over samples, one graph at a time, and which outer tensors it reaches."""
    total = problem.outer.layout.zeros()
    reached = [False] * len(problem.outer.tensors)
    for calls in samples:
        here = at.products.linearize(problem, calls)
        total += here.cross(at.signed(v))
        reached = [a or b for a, b in zip(reached, here.reached, strict=True)]
    return total / len(samples), reached


def decay_cross(
    situation: Situation, step: StepRecord, v: Tensor
) -> tuple[Tensor, list[bool]]:
    """∂_x⟨D(x) ∘ y, v⟩ for weight decay that outer variables determine.

    Args:
        situation: problem, optimizers and the registered function.
        step: the last inner step, whose hyperparameters are the present ones.
        v: the adjoint.

    Returns:
        It, flat, of the outer layout, and which outer tensors it reaches.

    Raises:
        InvalidHyperparameters: the function determines anything but weight decay.
    """
    problem, optimizers = situation.problem, situation.optimizers
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    hyper = HyperAdjoint(situation.loop.hyperparameters, step.position, groups)
    wrong = {
        key
        for values in hyper.groups
        for key, value in values.items()
        if key not in ("weight_decay", "params") and _differentiated(value)
    }
    if wrong:
        raise InvalidHyperparameters(
            f"{', '.join(sorted(wrong))} depend(s) on outer variables, and the point where an "
            "inner optimizer comes to rest does not depend on it, so an implicit estimator has no "
            "gradient for it. Use 'unrolled'. (Weight decay works with both.)"
        )
    first, known = 0, []
    with torch.enable_grad():
        for optimizer in optimizers:
            count = len(optimizer.param_groups)
            known += stationarity(optimizer, RULES, hyper.groups[first : first + count])
            first += count
        terms = [
            (item.decay * y.detach() * part).sum()
            for item, y, part in zip(
                known,
                problem.inner.tensors,
                problem.inner.layout.split(v),
                strict=True,
            )
            if _differentiated(item.decay)
        ]
        if terms:
            total = torch.stack([term.to(terms[0].device) for term in terms]).sum()
            hyper.bars = list(torch.autograd.grad(total, hyper.leaves))
    parts = hyper.to_outer(problem.outer.tensors)
    return problem.outer.layout.flatten(parts), [part is not None for part in parts]


def _differentiated(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_differentiated, value))
    return isinstance(value, Tensor) and value.requires_grad
