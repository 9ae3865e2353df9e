"""What an update rule is, and how the rule of an optimizer is found.

    (y_{k+1}, s_{k+1}) = Φ(y_k, ∇_y g, s_k; hyperparameters)

Φ is written as a pure, differentiable function of one parameter; its value is pinned by tests to
the ``torch.optim`` class it mirrors and its derivative to finite differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import NoUpdateRule
from .arithmetic import is_on, number

State = dict[str, Any]
Hyper = Mapping[str, Any]


class Stationarity(NamedTuple):
    """The equation an optimizer's fixed point solves: sign·∇_y g + decay ∘ y = 0.

    Attributes:
        sign: −1 where the optimizer maximises.
        decay: weight decay as it enters there, a number or a tensor of the parameter's shape.
        frozen: ``decay`` was computed from optimizer state and is held fixed, which is an
            approximation.
    """

    sign: float = 1.0
    decay: float | Tensor = 0.0
    frozen: bool = False


Step = Callable[[Tensor, Tensor, State, Hyper], tuple[Tensor, State]]
Transpose = Callable[
    [tuple[Tensor, Tensor, State], State, Hyper, Tensor, Tensor, State], None
]
StationarityOf = Callable[[Tensor, Tensor | None, State, Hyper], Stationarity]


@dataclass(frozen=True)
class UpdateRule:
    """The update of one optimizer class.

    Attributes:
        optimizer: the class it mirrors.
        step: ``(parameter, gradient, state, hyper) -> (parameter, state)``, pure.
        stationarity: ``(parameter, gradient, state, hyper) -> Stationarity``; None where it is
            not known how weight decay enters.
        elementwise: every entry moves by itself, so that a parameter can be taken in pieces.
        transpose: ``((parameter, gradient, state), next_state, hyper, ȳ, Ḡ, s̄)`` multiplies
            adjoints by the transposed derivative of a step, in place: ȳ and s̄ are those after
            it, s̄ for every entry of the next state that has one, and become those before it; Ḡ
            is overwritten. Every such entry has the parameter's shape. None differentiates
            ``step``, which gives the same and is slower.
    """

    optimizer: type[torch.optim.Optimizer]
    step: Step
    stationarity: StationarityOf | None = None
    elementwise: bool = True
    transpose: Transpose | None = None


def l2_stationarity(
    parameter: Tensor, gradient: Tensor | None, state: State, hyper: Hyper
) -> Stationarity:
    """Weight decay added to the gradient: ±∇_y g + wd·y = 0."""
    sign = -1.0 if hyper.get("maximize") else 1.0
    return Stationarity(sign, number(hyper.get("weight_decay", 0.0)))


def without_decay(name: str, where: str) -> StationarityOf:
    """∇_y g = 0, for optimizers whose weight decay leaves no equation of the form above.

    Args:
        name: of the optimizer.
        where: the place they stand still at with weight decay, in words.
    """

    def equation(
        parameter: Tensor, gradient: Tensor | None, state: State, hyper: Hyper
    ) -> Stationarity:
        if is_on(number(hyper["weight_decay"])):
            raise NoUpdateRule(
                f"{name} with weight_decay={hyper['weight_decay']} stands still where {where}, "
                "which is not of the form ∇_y g + D y = 0 that implicit estimators "
                "solve. Put the penalty into the registered loss and set weight_decay=0, or use "
                "the estimator 'unrolled'."
            )
        return l2_stationarity(parameter, gradient, state, hyper)

    return equation


def find_rule(
    optimizer: torch.optim.Optimizer, rules: Mapping[type, UpdateRule]
) -> UpdateRule | None:
    """The rule of an optimizer: of its class, or of a parent whose ``step`` it inherits."""
    for cls in type(optimizer).__mro__:
        if cls in rules:
            return rules[cls]
        if "step" in vars(cls):
            return None
    return None


def missing_rule(
    optimizer: torch.optim.Optimizer, rules: Mapping[type, UpdateRule]
) -> str:
    """The message for an optimizer without a rule."""
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        return (
            "A step of LBFGS evaluates its closure several times and searches along a line, which "
            "is not one differentiable update, so it cannot be unrolled. Use an implicit "
            "estimator such as 'cg', which needs no rule (LBFGS reaches the stationary point it "
            "relies on quickly), or unroll SGD or Adam."
        )
    known = ", ".join(cls.__name__ for cls in rules)
    return (
        f"The update rule of {name} is not known, so its steps cannot be differentiated "
        f"(known: {known}). Use an implicit estimator such as 'cg', which needs no rule, or "
        "one of the known optimizers, or register its update, a pure function "
        f"step(parameter, gradient, state, hyper) -> (parameter, state): "
        f"tb.register_update_rule({name}, step); docs/extending.md shows Lion's in ten lines."
    )


def stationarity(
    optimizer: torch.optim.Optimizer,
    rules: Mapping[type, UpdateRule],
    groups: Sequence[Hyper] | None = None,
) -> list[Stationarity]:
    """The stationarity of every parameter of an optimizer, at its present state.

    Args:
        optimizer: the optimizer.
        rules: the rules that are known.
        groups: hyperparameters to use in place of the present ones, per group.

    Returns:
        One per parameter.

    Raises:
        NoUpdateRule: the optimizer has weight decay and no rule that says how it enters.
    """
    rule = find_rule(optimizer, rules)
    equation = None if rule is None else rule.stationarity
    found = []
    for index, group in enumerate(optimizer.param_groups):
        hyper = group if groups is None else groups[index]
        if equation is None and group.get("weight_decay"):
            raise NoUpdateRule(
                f"{type(optimizer).__name__} has weight_decay={group['weight_decay']} and no "
                "stationarity that says how it enters the inner problem; the implicit system "
                "would be that of another problem. Put the penalty into the registered loss "
                "and set weight_decay=0, or register a rule with its stationarity "
                "(tb.register_update_rule, docs/extending.md)."
            )
        for parameter in group["params"]:
            if equation is None:
                sign = -1.0 if group.get("maximize") else 1.0
                found.append(Stationarity(sign))
            else:
                state = optimizer.state.get(parameter, {})
                found.append(equation(parameter.detach(), None, state, hyper))
    return found
