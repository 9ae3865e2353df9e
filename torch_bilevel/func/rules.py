"""Update rules as pure functions on lists of tensors.

    s_0 = init(y_0);      (y_{k+1}, s_{k+1}) = update(∇_y g, s_k, y_k)

A rule is one of

- a `Rule`, the step of a ``torch.optim`` class: ``rule(torch.optim.SGD, lr=0.1)`` or
  ``"sgd(lr=0.1)"``;
- a *gradient transformation*, the protocol of optax and TorchOpt: ``init(params)`` gives s_0 and
  ``update(gradients, state, params=params)`` gives updates u and s_{k+1}; y_{k+1} = y_k + u;
- a function of the outer variables and the number of the step that gives one of these:
  ``lambda outer, step: rule(torch.optim.SGD, lr=outer["lr"])``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from .. import _registry
from ..errors import NoUpdateRule, UnknownName
from ..inner import RULES, find_rule, missing_rule
from ..solvers import constant, transformed

Update = Callable[[list[Tensor], Any, list[Tensor]], tuple[list[Tensor], Any]]


@dataclass(frozen=True)
class Rule:
    """The update of a ``torch.optim`` class as a pure function; made by `rule`.

    Attributes:
        optimizer: the class.
        step: the update of one parameter.
        hyper: every option of the class. A tensor among them is differentiated and batched like
            any other tensor.

    Example:
        >>> import torch
        >>> from torch_bilevel.func.rules import rule
        >>> sgd = rule(torch.optim.SGD, lr=0.5)
        >>> y = [torch.tensor(1.0)]
        >>> sgd.update([torch.tensor(2.0)], sgd.init(y), y)           # 1 − 0.5·2
        ([tensor(0.)], [{}])
    """

    optimizer: type[Optimizer]
    step: Callable[..., tuple[Tensor, dict[str, Any]]]
    hyper: Mapping[str, Any]

    def init(self, params: Sequence[Tensor]) -> list[dict[str, Any]]:
        """The state before the first step: empty, one dictionary for each parameter."""
        return [{} for _ in params]

    def update(
        self,
        gradients: Sequence[Tensor],
        state: Sequence[dict[str, Any]],
        params: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """One step.

        Args:
            gradients: ∇_y g, one for each parameter.
            state: what `init` or the step before gave.
            params: y_k.

        Returns:
            y_{k+1} and the next state.
        """
        new, new_state = [], []
        for y, g, s in zip(params, gradients, state, strict=True):
            y, s = self.step(y, g, s, self.hyper)
            new.append(y)
            new_state.append(s)
        return new, new_state


def rule(optimizer: str | type[Optimizer], **options: Any) -> Rule:
    """The update of an optimizer as a pure function: (y, s) ← Φ(y, ∇_y g, s).

    Args:
        optimizer: a class of ``torch.optim``, one registered with `register_update_rule`, or a
            name with options: ``"sgd(lr=0.1, momentum=0.9)"``, ``"adam(lr=1e-3)"``; names are
            the classes' in lower case.
        **options: of the class; what is left out has the class's default. Numbers may be
            tensors that are differentiated or batched (a learned learning rate).

    Returns:
        The rule, for `unroll`.

    Raises:
        UnknownName: no optimizer of that name, or an option it does not have.
        NoUpdateRule: the update of the class is not known.
        TypeError: ``optimizer`` is neither a name nor a class of optimizers.
        ValueError: the class refuses the value of an option.

    Example:
        >>> import torch
        >>> from torch_bilevel.func.rules import rule
        >>> rule("sgd(lr=0.1, momentum=0.9)").hyper["momentum"]
        0.9
        >>> rule(torch.optim.Adam).hyper["betas"]
        (0.9, 0.999)
        >>> rule("smd(lr=0.1)")
        Traceback (most recent call last):
        torch_bilevel.errors.UnknownName: There is no update rule named 'smd'. Did you mean 'sgd'...
    """
    if isinstance(optimizer, str):
        known = {cls.__name__.lower(): cls for cls in RULES}
        name, written = _registry.parse(
            optimizer, known, "update rule", "sgd(lr=0.1, momentum=0.9)"
        )
        return rule(known[name], **{**written, **options})
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(
            f"rule({optimizer!r}): write a class, rule(torch.optim.SGD, lr=0.1), or a name with "
            "options, rule('sgd(lr=0.1)')."
        )
    # A tensor is not the constructor's business: it would read its value.
    learned = {key: value for key, value in options.items() if _has_tensor(value)}
    plain = tuple((key, options[key]) for key in options if key not in learned)
    place, group, accepted = _of_class(optimizer, plain, tuple(learned))
    hyper = dict(group)
    for key in options:
        if key not in hyper and (key in learned or key not in accepted):
            raise UnknownName(
                f"{optimizer.__name__} has no option {key!r}. {_registry.suggest(key, hyper)}"
            )
    step = tuple(RULES.values())[place].step
    return Rule(optimizer, step, {**hyper, **learned})


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


# A program takes the result as it is when it is recorded: optimizers cannot be made inside it, and
# constants are numbers, strings and tuples, not functions.
@constant
def _of_class(
    cls: type[Optimizer], options: Sequence[tuple[str, Any]], learned: Sequence[str]
) -> tuple[int, tuple[tuple[str, Any], ...], tuple[str, ...]]:
    """The place in RULES of a class, its parameter group, and the options it accepts.

    Raises:
        NoUpdateRule: no step is known.
    """
    parameters = inspect.signature(cls).parameters
    accepted = [name for name in parameters if name != "params"]
    wanted = {key: value for key, value in options if key in accepted}
    for key in learned:  # a constructor that insists on a number gets one
        if key in accepted and parameters[key].default is inspect.Parameter.empty:
            wanted[key] = 0.5
    # a matrix, for Muon takes nothing else
    optimizer = cls([torch.zeros(1, 1)], **wanted)
    found = find_rule(optimizer, RULES)
    if found is None:
        raise NoUpdateRule(missing_rule(optimizer, RULES))
    group = dict(optimizer.param_groups[0])
    del group["params"]
    # options the constructor names otherwise than the group (damping, lr)
    group.update((key, value) for key, value in options if key in group)
    place = list(RULES.values()).index(found)
    return place, tuple(group.items()), tuple(accepted)


def resolve(given: Any, outer: Any, step: int) -> Any:
    """The rule of one step, from what was given to `unroll`: named, itself or a function.

    Raises:
        TypeError: it is no rule.
    """
    found = given
    if not is_rule(found) and callable(found) and not isinstance(found, type):
        found = given(outer, step)
    if isinstance(found, str):
        found = rule(found)
    if not is_rule(found):
        seen = f"{type(found).__name__} {found!r}"
        if isinstance(found, Optimizer) or isinstance(found, type):
            name = getattr(found, "__name__", type(found).__name__)
            raise TypeError(
                f"unroll was given {name} for a rule; write rule(torch.optim.{name}, lr=...)."
            )
        raise TypeError(
            f"unroll was given the {seen} for a rule. Write rule(torch.optim.SGD, lr=0.1), "
            "'sgd(lr=0.1)', a gradient transformation with init and update, or a function of "
            "(outer, step) that returns one of these."
        )
    _refuse_clipping(found)
    return found


def _refuse_clipping(found: Any) -> None:
    """Refuse what of TorchOpt computes without derivative.

    Raises:
        NoUpdateRule: a norm of gradients is a constant to it.
    """
    for part in (found, *getattr(found, "transformations", ())):
        if getattr(part.update, "__module__", None) == "torchopt.clip":
            raise NoUpdateRule(
                "torchopt.clip.clip_grad_norm takes the norm of the gradients for a constant, so "
                "the derivative of a step would be wrong. Write the clipping as a transformation "
                "of your own, init and update, with torch operations."
            )


def is_rule(given: Any) -> bool:
    """Whether something has the two functions of a rule."""
    if isinstance(given, type):
        return False
    return callable(getattr(given, "init", None)) and callable(
        getattr(given, "update", None)
    )


def initial_state(found: Any, params: list[Tensor], gradients: list[Tensor]) -> Any:
    """The state of a rule before the first step.

    Under ``vmap`` gradients may be batched where parameters are not yet. TorchOpt's buffers,
    zeros like the parameters, are written into, and have to be batched from the start.
    """
    if isinstance(found, Rule) or not transformed():
        return found.init(params)
    like = zip(params, gradients, strict=True)
    return found.init([p + torch.zeros_like(g) for p, g in like])


def update_of(found: Any) -> Update:
    """The step of a rule of either kind: (gradients, state, params) → (params, state)."""
    if isinstance(found, Rule):
        return found.update
    options = inspect.signature(found.update).parameters
    # TorchOpt writes into the gradients unless told not to.
    extra = {"inplace": False} if "inplace" in options else {}

    def update(
        gradients: list[Tensor], state: Any, params: list[Tensor]
    ) -> tuple[list[Tensor], Any]:
        updates, state = found.update(gradients, state, params=params, **extra)
        return [p + u for p, u in zip(params, updates, strict=True)], state

    return update
