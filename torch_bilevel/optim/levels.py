"""The two levels of a problem, as the user's optimizers give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..errors import BilevelError, InvalidHyperparameters, UnsupportedParameter
from ..problem import BilevelProblem, ModuleSet, Variables
from .delegation import DelegatingOptimizer


def parameters(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """Every parameter of some optimizers, in order."""
    return [p for o in optimizers for group in o.param_groups for p in group["params"]]


def build(
    inners: Sequence[torch.optim.Optimizer],
    outer: torch.optim.Optimizer,
    modules: ModuleSet,
) -> BilevelProblem:
    """The problem at the live parameters of the optimizers.

    Raises:
        InvalidHyperparameters: an inner group holds a tensor that requires grad.
    """
    for number, group in enumerate(g for o in inners for g in o.param_groups):
        for key, value in group.items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise InvalidHyperparameters(
                    f"{key!r} of inner parameter group {number} is a tensor that requires grad. An "
                    "optimizer reads its number only, so no gradient would reach it. Write "
                    f"{key}=float(...) and return the tensor from a function registered with "
                    f"@optimizer.inner_hyperparameters: lambda step: {{{key!r}: x}}."
                )

    def variables(role: str, tensors: list[Tensor]) -> Variables:
        return Variables(role, tensors, names(modules, role, tensors))

    return BilevelProblem(
        variables("inner", parameters(inners)),
        variables("outer", parameters([outer])),
        modules,
    )


def fits(
    problem: BilevelProblem,
    inners: Sequence[torch.optim.Optimizer],
    outer: torch.optim.Optimizer,
) -> bool:
    """Whether the optimizers still have the parameters the problem was built for."""
    # On the path of every inner step.
    inner = outer_ = 0
    for optimizer in inners:
        for group in optimizer.param_groups:
            inner += len(group["params"])
    for group in outer.param_groups:
        outer_ += len(group["params"])
    return inner == len(problem.inner.tensors) and outer_ == len(problem.outer.tensors)


def names(modules: ModuleSet, role: str, tensors: Sequence[Tensor]) -> list[str]:
    """Names of parameters in the known modules, else their number."""
    found: dict[int, str] = {}
    for module in modules.members.values():
        for name, parameter in module.named_parameters():
            if len(found.get(id(parameter), "")) < len(name):
                found[id(parameter)] = name
    return [found.get(id(p), f"{role}[{i}]") for i, p in enumerate(tensors)]


def known_modules(given: Any) -> ModuleSet:
    """The modules that a user names: one or several.

    Raises:
        TypeError: something is not a module.
    """
    several = (given,) if isinstance(given, nn.Module) else tuple(given or ())
    if not all(isinstance(module, nn.Module) for module in several):
        raise TypeError(f"modules={given!r}: pass a module or several.")
    return ModuleSet(several)


def check_options(unused: str, **numbers: int | None) -> None:
    """Refuse options of `BilevelOptimizer` that make no sense.

    Raises:
        ValueError: ``unused`` is not one of its two words, or a number is not positive.
    """
    if unused not in ("error", "zero"):
        raise ValueError(f"unused={unused!r}: write 'error' or 'zero'.")
    for name, value in numbers.items():
        _checks.positive_int("BilevelOptimizer", name, value, optional=True)


def check_levels(inners: Sequence[Any], outer: Any) -> None:
    """Refuse what cannot be the two levels of a problem.

    Raises:
        TypeError: something is not a plain ``torch.optim`` optimizer.
        BilevelError: the same optimizer is both levels.
        UnsupportedParameter: an outer tensor does not require grad.
    """
    for role, optimizer in [*(("inner", o) for o in inners), ("outer", outer)]:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{role}= must be a torch.optim optimizer, got {type(optimizer).__name__}. "
                f"For example {role}=torch.optim.SGD(parameters, lr=0.1)."
            )
        if isinstance(optimizer, DelegatingOptimizer):
            raise TypeError(
                f"{role}= is itself a BilevelOptimizer; pass a plain optimizer."
            )
    if not inners:
        raise TypeError("inner= is an empty list; pass at least one optimizer.")
    constant = [p for p in parameters([outer]) if not p.requires_grad]
    if constant:
        raise UnsupportedParameter(
            f"{len(constant)} tensor(s) of the outer optimizer (first: shape "
            f"{tuple(constant[0].shape)}) do not require grad. Create outer variables with "
            "requires_grad=True, or call .requires_grad_() on them."
        )
    if any(outer is o for o in inners):
        raise BilevelError("inner and outer are the same optimizer.")
