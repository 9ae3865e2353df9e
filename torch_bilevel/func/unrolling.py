"""An inner training loop as a differentiable function of its outer variables.

    y_{k+1}, s_{k+1} = Φ_k(y_k, ∇_y g(y_k, x), s_k),   k = 0 … T−1;      train(y_0, x) = y_T

Every step is made of operations PyTorch differentiates, so that ``train`` is a function like any
other under ``torch.func``, autograd and ``torch.compile``:

    train = unroll(rule(torch.optim.SGD, lr=0.1), num_steps=10)(inner_loss)
    torch.func.grad(lambda x: outer_loss(train(initial, x), x))(x)               # hypergradient
    torch.func.vmap(train, in_dims=(None, 0))(initial, many_x)                   # many at once
    torch.func.vmap(torch.func.grad(task_loss), in_dims=(None, 0))(initial, tasks)    # MAML
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _checks
from ..errors import BilevelError, Disconnected, InvalidLoss, UnknownName
from . import trees
from .evaluation import evaluating, name_of
from .rules import Rule, initial_state, resolve, update_of
from .segments import final_by_tangents, recomputed

InnerLoss = Callable[..., Tensor]
Train = Callable[..., Any]


def unroll(
    rule: Any,
    num_steps: int,
    *,
    mode: str = "reverse",
    window: int | None = None,
    checkpoint_every: int | str | None = None,
    per_step: bool = False,
) -> Callable[[InnerLoss], Train]:
    """Make an inner loss into a training loop that can be differentiated.

    ::

        y_{k+1} = Φ(y_k, ∇_y g(y_k, x));    train(y_0, x, *data) = y_T

    A decorator of ``inner_loss(inner, outer, *data)``; it composes with ``vmap``, ``grad``,
    ``jvp``, ``jacrev``, ``jacfwd`` and ``hessian`` of ``torch.func``, with ``backward()``, and in
    reverse mode without checkpoints with ``torch.compile(fullgraph=True)``.

    Args:
        rule: Φ: ``rule(torch.optim.SGD, lr=0.1)``, ``"sgd(lr=0.1)"``, a gradient transformation
            of TorchOpt or of the same protocol (``init``, ``update``), or a function of
            ``(outer, step)`` that gives one of these, called at every step.
        num_steps: T.
        mode: "reverse" keeps the steps for a backward pass: memory O(T), any derivative.
            "forward" carries ∂y_k/∂x along: memory O(outer size · inner size) for any T,
            about ``outer size`` times the work, first derivatives with respect to ``outer`` only.
        window: differentiate the last ``window`` steps only (truncated back-propagation). What
            comes before is a constant for x, and a translation for y_0: its derivative is that
            with respect to the iterate the window starts at, as first-order MAML has it.
        checkpoint_every: keep every c-th iterate and compute the steps between again in the
            backward pass: memory O(T/c + c) for one more forward pass. "auto" is √T. Random
            numbers are drawn again as they were.
        per_step: every tensor in ``data`` has a leading axis of length T, and step k sees
            entry k: one batch for each step.

    Returns:
        A decorator: ``inner_loss(inner, outer, *data)``, a scalar, becomes
        ``train(initial, outer, *data)``, a pytree like ``initial``. ``initial`` and ``outer`` are
        pytrees of floating-point tensors (``outer`` may be empty), ``data`` are any pytrees. A
        leaf of ``initial`` that the loss does not use has gradient zero.

    Raises:
        ValueError: ``num_steps``, ``window`` or ``checkpoint_every`` is not a positive integer.
        UnknownName: no such mode, update rule or option.
        TypeError: ``rule`` is not a rule.
        BilevelError: options that exclude each other.

    ``train`` raises InvalidLoss where the loss is not one real number, Disconnected where it does
    not depend on ``inner``, UnsupportedParameter where a leaf is not a floating-point tensor,
    NoSecondDerivative where forward mode is differentiated twice, ForwardOverForward where
    checkpoints meet two nested forward modes, and UnnamedClosure where checkpoints or forward
    mode would lose the derivative of a tensor the loss reaches by closure (found by evaluating
    one step more).

    Example:
        >>> import torch
        >>> from torch_bilevel.func.rules import rule
        >>> from torch_bilevel.func.unrolling import unroll
        >>> @unroll(rule(torch.optim.SGD, lr=0.5), num_steps=2)
        ... def train(y, x):
        ...     return (y - x) ** 2 / 2                     # y_2 = x + (1 − 0.5)² (y_0 − x)
        >>> y0, x = torch.tensor(0.0), torch.tensor(4.0)
        >>> train(y0, x)
        tensor(3.)
        >>> torch.func.grad(train, argnums=1)(y0, x)        # 1 − (1 − 0.5)²
        tensor(0.7500)
    """
    plan = Plan.of(rule, num_steps, mode, window, checkpoint_every, per_step)

    def decorate(inner_loss: InnerLoss) -> Train:
        @functools.wraps(inner_loss)
        def train(initial: Any, outer: Any, *data: Any) -> Any:
            return _train(plan, inner_loss, initial, outer, data)

        return train

    return decorate


@dataclass(frozen=True)
class Plan:
    """What `unroll` was asked for, checked.

    Attributes:
        rule: as it was given.
        num_steps: T.
        mode: "reverse" or "forward".
        start: the first step that is differentiated.
        every: steps between checkpoints, None without.
        per_step: data has a leading axis of steps.
    """

    rule: Any
    num_steps: int
    mode: str
    start: int
    every: int | None
    per_step: bool

    @classmethod
    def of(
        cls,
        rule: Any,
        num_steps: int,
        mode: str,
        window: int | None,
        every: int | str | None,
        per_step: bool,
    ) -> Plan:
        """Check the options of `unroll`.

        Raises:
            UnknownName: no such mode.
            BilevelError: forward mode with checkpoints.
        """
        _checks.positive_int("unroll", "num_steps", num_steps)
        _checks.positive_int("unroll", "window", window, optional=True)
        if every == "auto":
            every = max(1, round(num_steps**0.5))
        _checks.positive_int("unroll", "checkpoint_every", every, optional=True)
        if mode not in ("reverse", "forward"):
            raise UnknownName(f"unroll(mode={mode!r}): write 'reverse' or 'forward'.")
        if mode == "forward" and every is not None:
            raise BilevelError(
                f"unroll(mode='forward', checkpoint_every={every}): forward mode keeps no steps: "
                "nothing to checkpoint; leave checkpoint_every out."
            )
        if isinstance(rule, str) or not callable(rule) or isinstance(rule, type):
            rule = resolve(rule, None, 0)  # so that a misspelled name is an error here
        start = 0 if window is None else max(0, num_steps - window)
        return cls(rule, num_steps, mode, start, every, per_step)  # type: ignore[arg-type]


class Carried(NamedTuple):
    """Everything a stretch of steps depends on; a pytree.

    Attributes:
        inner: y_k, a list of tensors.
        state: that of the rule; None before the first step.
        outer: x.
        hyper: the options of a `Rule`, whose tensors may be differentiated too.
        data: the batches.
    """

    inner: list[Tensor]
    state: Any
    outer: Any
    hyper: Any
    data: Any


def _train(
    plan: Plan, loss: InnerLoss, initial: Any, outer: Any, data: tuple[Any, ...]
) -> Any:
    """y_T as a pytree like ``initial``."""
    inner, structure = pytree.tree_flatten(initial)
    _check_variables(initial, outer)
    if plan.per_step:
        _check_axis(data, plan.num_steps)
    hyper = plan.rule.hyper if isinstance(plan.rule, Rule) else None
    steps = Steps(plan, loss, structure)
    at = Carried(inner, None, outer, hyper, data)
    if plan.start:
        # What comes before the window is a translation of y_0, the same for every x.
        before = steps(trees.detached(at), 0, plan.start)
        at = at._replace(
            inner=trees.translated(before.inner, at.inner),
            state=trees.detached(before.state),
        )
    if plan.mode == "forward":
        found = final_by_tangents(steps, at, plan.start, plan.num_steps)
    elif plan.every is None:
        found = steps(at, plan.start, plan.num_steps).inner
    else:
        found = recomputed(steps, at, plan.start, plan.num_steps, plan.every)
    return pytree.tree_unflatten(found, structure)


# no ==: PyTorch 2.11's compiler hashes it before it has fields
@dataclass(frozen=True, eq=False)
class Steps:
    """The loop itself.

    Args:
        plan: what was asked for.
        loss: g.
        structure: that of the inner variables.
    """

    plan: Plan
    loss: InnerLoss
    structure: Any

    def __call__(self, at: Carried, first: int, last: int) -> Carried:
        """Steps first … last − 1.

        Args:
            at: where the first one starts. Its data are those of all steps.
            first: the number of the first step.
            last: one more than that of the last.

        Returns:
            As ``at``, with inner variables and state after the last step.
        """
        return self.on(
            at._replace(data=self.batches(at.data, first, last)), first, last
        )

    def batches(self, data: Any, first: int, last: int) -> Any:
        """The data of some steps: all of it, or part of the leading axes."""
        if not self.plan.per_step:
            return data
        return pytree.tree_map(
            lambda leaf: leaf[first:last] if isinstance(leaf, Tensor) else leaf, data
        )

    def on(self, at: Carried, first: int, last: int) -> Carried:
        """As calling it, where ``at`` has the data of these steps alone."""
        inner, state = at.inner, at.state
        with evaluating():
            for k in range(first, last):
                found = resolve(self.plan.rule, at.outer, k)
                if isinstance(self.plan.rule, Rule):
                    found = replace(self.plan.rule, hyper=at.hyper)
                batch = at.data
                if self.plan.per_step:
                    batch = pytree.tree_map(functools.partial(_entry, k - first), batch)
                # y_{k+1}, s_{k+1} = Φ_k(y_k, ∇_y g(y_k, x), s_k)
                gradients = self.gradients(inner, at.outer, batch)
                state = initial_state(found, inner, gradients) if k == 0 else state
                inner, state = update_of(found)(gradients, state, inner)
        return at._replace(inner=inner, state=state)

    def gradients(self, inner: list[Tensor], outer: Any, batch: Any) -> list[Tensor]:
        """∇_y g, one tensor for each inner leaf."""

        def value(*leaves: Tensor) -> Tensor:
            tree = pytree.tree_unflatten(list(leaves), self.structure)
            return _scalar(self.loss, self.loss(tree, outer, *batch))

        every = tuple(range(len(inner)))
        return list(torch.func.grad(value, argnums=every)(*inner))


def _entry(k: int, leaf: Any) -> Any:
    return leaf[k] if isinstance(leaf, Tensor) else leaf


def _scalar(loss: InnerLoss, value: Any) -> Tensor:
    """The value of the inner loss, one real number that depends on the inner variables.

    Raises:
        InvalidLoss: it is not one real number.
        Disconnected: it does not depend on them.
    """
    name = name_of(loss)
    if not isinstance(value, Tensor):
        raise InvalidLoss(
            f"The inner loss {name!r} returned a {type(value).__name__}; return a scalar tensor."
        )
    if value.numel() != 1 or not value.is_floating_point():
        raise InvalidLoss(
            f"The inner loss {name!r} returned a tensor of shape {tuple(value.shape)} and dtype "
            f"{value.dtype}; return one real number, for example with .mean()."
        )
    if not torch.compiler.is_compiling() and not value.requires_grad:
        raise Disconnected(
            f"The inner loss {name!r} does not depend on the inner variables, its first argument, "
            "so no step moves them. Compute it from that argument (for a module: "
            "torch.func.functional_call(module, inner, inputs)), without detach() or no_grad()."
        )
    return value.reshape(())


def _check_variables(initial: Any, outer: Any) -> None:
    """Refuse leaves that cannot be differentiated; ``outer`` may be empty or None."""
    if torch.compiler.is_compiling():
        return  # messages name the leaves by paths, which are not recorded
    trees.Flat(initial, "initial")
    if outer is not None and pytree.tree_leaves(outer):
        trees.Flat(outer, "outer")


def _check_axis(data: Sequence[Any], num_steps: int) -> None:
    """Refuse data that has not one entry for each step.

    Raises:
        BilevelError: with the shape that was seen.
    """
    for leaf in pytree.tree_leaves(data):
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or len(leaf) != num_steps):
            raise BilevelError(
                f"unroll(num_steps={num_steps}, per_step=True): a tensor of shape "
                f"{tuple(leaf.shape)} was given as data; its leading axis must have length "
                f"{num_steps}, one entry for each step. Stack the batches with torch.stack, or "
                "leave per_step out if every step sees all of it."
            )
