"""Meta-learning over a batch of tasks at once: every task is a lane of ``vmap``.

    y_i: y_0(x) adapted to the support batch of task i;   ∇Φ = (1/T) Σ_i d f(y_i(x), x, query_i)/dx

MAML, ANIL, FOMAML, Reptile and iMAML differ in y_0 and in how dy_i/dx is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _checks
from ..errors import InvalidLoss, NeedsLoop, NoSecondDerivative
from ..estimators import (
    Displacement,
    Estimator,
    FirstOrder,
    Implicit,
    Unrolled,
    parse,
)
from ..solvers import differentiated
from .hypergradients import Hypergradient, Loss
from .levels import derivatives
from .trees import Flat, detached, translated
from .unrolling import unroll


class TaskReport(NamedTuple):
    """What a batch of tasks gave; one number for each of them, but for ``norm``.

    Attributes:
        losses: f after adaptation, shape ``(T,)``.
        norm: ‖∇Φ‖ of the mean, 0-d.
        residual: of the linear solve; NaN where nothing is solved.
        converged: whether its tolerance was met; True where nothing is solved.
    """

    losses: Tensor
    norm: Tensor
    residual: Tensor
    converged: Tensor


class TaskGradient:
    """The mean hypergradient of a batch of tasks; see `task_gradient`, which makes it."""

    def __init__(
        self,
        inner_loss: Loss,
        outer_loss: Loss,
        *,
        rule: Any,
        num_steps: int,
        estimator: Estimator,
        initial: Callable[[Any], Any],
        proximal_term: float,
        chunk_size: int | None,
        randomness: str,
    ):
        self.inner_loss = inner_loss
        self.outer_loss = outer_loss
        self.estimator = estimator
        self.initial = initial
        self.proximal_term = proximal_term
        self.chunk_size = chunk_size
        self.randomness = randomness
        window = every = None
        if isinstance(estimator, Unrolled):
            window, every = estimator.window, estimator.checkpoint_every
        steps = unroll(rule, num_steps, window=window, checkpoint_every=every)
        # (y, (x, y_0), batch): the pull towards y_0 is part of the inner loss
        self.train = steps(self._pulled)
        self.one: Callable[..., Any] = self._unrolled
        if isinstance(estimator, FirstOrder):
            self.one = self._first_order
        elif isinstance(estimator, Displacement):
            self.one = self._displaced
        elif isinstance(estimator, Implicit):
            self.implicit = Hypergradient(
                self._proximal, outer_loss, estimator, str(estimator)
            )
            self.one = self._implicit
        elif not isinstance(estimator, Unrolled):
            raise NeedsLoop(
                f"estimator={str(estimator)!r} cannot be used in tb.func.task_gradient. Write "
                "'unrolled' (MAML, ANIL), 'first_order' (FOMAML), 'displacement' (Reptile) or an "
                "implicit estimator such as 'cg' (iMAML)."
            )

    def __call__(self, outer: Any, support: Any, query: Any) -> tuple[Any, TaskReport]:
        """The mean gradient over tasks, and what every task gave."""
        support, query = pytree.tree_map(_as_tensor, (support, query))
        count, flat = _count(support, query), Flat(outer, "outer")
        if self.one != self._unrolled:
            outer = self._undifferentiated(outer)
        gradients, losses, residual, converged = self._over_tasks(
            lambda support, query: self.one(outer, support, query), support, query
        )
        mean = pytree.tree_map(lambda g: g.mean(0), gradients)
        norm = torch.linalg.vector_norm(flat.vector(mean).detach())
        expanded = (part.expand(count) for part in (losses, residual, converged))
        losses, residual, converged = expanded
        return mean, TaskReport(losses.detach(), norm, residual, converged)

    def _undifferentiated(self, outer: Any) -> Any:
        """Outer variables without derivative: these estimators take the adapted y for a constant.

        Raises:
            NoSecondDerivative: a transform differentiates it.
        """
        leaves = pytree.tree_leaves(outer)
        compiling = torch.compiler.is_compiling()
        if differentiated() and (
            compiling or any(level for leaf in leaves for level, _ in derivatives(leaf))
        ):
            raise NoSecondDerivative(
                f"tb.func.task_gradient(estimator={str(self.estimator)!r}) is differentiated by "
                "a transform, and takes where the tasks ended for constants: terms would be "
                "missing. Use estimator='unrolled'."
            )
        return detached(outer)

    def adapt(self, outer: Any, support: Any) -> Any:
        """The inner variables of every task after adaptation, stacked along a leading axis."""
        support = pytree.tree_map(_as_tensor, support)
        _count(support)
        return self._over_tasks(lambda s: self._adapted(outer, s), support)

    def _over_tasks(self, one: Callable[..., Any], *batches: Any) -> Any:
        # what is no tensor is the same for all tasks
        axes = pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) else None, batches)
        return torch.func.vmap(
            one, axes, chunk_size=self.chunk_size, randomness=self.randomness
        )(*batches)

    def _pulled(self, inner: Any, given: Any, batch: Any) -> Any:
        """The inner loss g + (λ/2) ‖y − y_0‖², with y_0 given."""
        outer, start = given
        loss = self.inner_loss(inner, outer, batch)
        if not self.proximal_term:
            return loss
        pairs = zip(pytree.tree_leaves(inner), pytree.tree_leaves(start), strict=True)
        distance = sum(((y - a) ** 2).sum() for y, a in pairs)
        return loss + self.proximal_term / 2 * distance

    def _proximal(self, inner: Any, outer: Any, batch: Any) -> Any:
        """The same as a function of x."""
        return self._pulled(inner, (outer, self.initial(outer)), batch)

    def _adapted(self, outer: Any, support: Any) -> Any:
        start = self.initial(outer)
        return self.train(start, (outer, start), support)

    def _constant(self, outer: Any, support: Any) -> Any:
        """y_i without derivative."""
        return detached(self._adapted(detached(outer), support))

    def _unrolled(self, outer: Any, support: Any, query: Any) -> Any:
        """d/dx f(y_K(x), x), through the steps."""

        def loss(x: Any) -> Tensor:
            return self.outer_loss(self._adapted(x, support), x, query)

        return _told(*torch.func.grad_and_value(loss)(outer))

    def _first_order(self, outer: Any, support: Any, query: Any) -> Any:
        """∂_x f + (dy_0/dx)ᵀ ∂_y f at y_K, as if the steps were translations."""
        adapted = self._constant(outer, support)

        def loss(x: Any) -> Tensor:
            return self.outer_loss(translated(adapted, self.initial(x)), x, query)

        return _told(*torch.func.grad_and_value(loss)(outer))

    def _displaced(self, outer: Any, support: Any, query: Any) -> Any:
        """(dy_0/dx)ᵀ (y_0 − y_K)."""
        adapted = self._constant(outer, support)
        start, pull = torch.func.vjp(self.initial, outer)  # type: ignore[misc]
        (gradient,) = pull(pytree.tree_map(lambda a, y: a - y, start, adapted))
        return _told(gradient, self.outer_loss(adapted, outer, query))

    def _implicit(self, outer: Any, support: Any, query: Any) -> Any:
        """∂_x f − J v at y_K, with the proximal term in H and J."""
        adapted = self._constant(outer, support)
        gradient, report = self.implicit(adapted, outer, support, query)
        return gradient, report.loss, report.residual, report.converged


def task_gradient(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    rule: Any,
    num_steps: int,
    estimator: str | Estimator = "unrolled",
    initial: Callable[[Any], Any] = lambda outer: outer,
    proximal_term: float = 0.0,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> TaskGradient:
    r"""The mean hypergradient over a batch of tasks, all of them at once.

        y_i = num_steps steps of the rule on g(·, x, support_i) + (λ/2)‖· − y_0(x)‖² from y_0(x)
        ∇Φ(x) = (1/T) Σ_i d f(y_i(x), x, query_i)/dx

    ``task_gradient(g, f, ...)(outer, support, query)`` returns (gradient, report): a pytree like
    ``outer`` and a `TaskReport`. Every tensor of ``support`` and ``query`` has a leading axis of
    tasks, and every array; other leaves are the same for all. ``.adapt(outer, support)`` gives the
    adapted inner variables, for test time.

    ====================  =============================================================
    MAML                  the defaults
    ANIL                  ``initial=lambda x: x["head"]``; g and f take features from x
    FOMAML                ``estimator="first_order"``
    Reptile               ``estimator="displacement"``
    iMAML                 ``estimator="cg(max_steps=5)", proximal_term=1.0``
    Meta-SGD              ``rule=lambda given, step: tb.func.rule(torch.optim.SGD, lr=...)``,
                          where given is (x, y_0)
    ====================  =============================================================

    With "unrolled" it is a function like any other under ``torch.func``; the others take y_i for
    constants and are not differentiated again.

    Costs: T times that of one task, in batched operations; a gradient like ``outer`` for every task
    of a chunk.

    Args:
        inner_loss: g, ``(inner, outer, support) -> scalar`` of one task.
        outer_loss: f, ``(inner, outer, query) -> scalar`` of one task.
        rule: the update, as in `unroll`.
        num_steps: steps of adaptation.
        estimator: ``"unrolled"`` with its ``window`` and ``checkpoint_every``, ``"first_order"``,
            ``"displacement"``, or an implicit one. The steps before a window are
            translations of y_0, as in `unroll`.
        initial: y_0, a function of ``outer``; by default all of it is the initialisation.
        proximal_term: λ.
        chunk_size: tasks at once; None takes all.
        randomness: of ``vmap``: ``"error"``, ``"different"`` or ``"same"`` draws in all tasks.

    Returns:
        The function.

    Raises:
        NeedsLoop: the estimator is none of these.
        NoSecondDerivative: a transform differentiates the gradient of another than "unrolled".
        InvalidLoss: the batches have no common leading axis.
        ValueError: a number is out of range.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> def loss(w, x, target):
        ...     return ((w - target) ** 2).sum() / 2
        >>> maml = tb.func.task_gradient(loss, loss, rule="sgd(lr=0.5)", num_steps=1)
        >>> targets = torch.tensor([[1.], [3.]])
        >>> gradient, report = maml(torch.zeros(1), targets, targets)
        >>> gradient, report.losses                 # (1 − 0.5)² times the mean of −1 and −3
        (tensor([-0.5000]), tensor([0.1250, 1.1250]))
    """
    _checks.real("task_gradient", "proximal_term", proximal_term)
    _checks.positive_int("task_gradient", "chunk_size", chunk_size, optional=True)
    return TaskGradient(
        inner_loss,
        outer_loss,
        rule=rule,
        num_steps=num_steps,
        estimator=parse(estimator),
        initial=initial,
        proximal_term=proximal_term,
        chunk_size=chunk_size,
        randomness=randomness,
    )


def _told(gradient: Any, loss: Tensor) -> Any:
    """(gradient, loss, residual, converged) of a task in which nothing is solved."""
    return (
        gradient,
        loss,
        torch.full_like(loss, torch.nan),
        torch.ones_like(loss, dtype=torch.bool),
    )


def _as_tensor(leaf: Any) -> Any:
    """An array as a tensor, which has an axis of tasks too."""
    return torch.as_tensor(leaf) if hasattr(leaf, "__array__") else leaf


def _count(*batches: Any) -> int:
    """How many tasks the batches are of.

    Raises:
        InvalidLoss: their leading axes differ, or there are none.
    """
    leaves = [x for x in pytree.tree_leaves(batches) if isinstance(x, Tensor)]
    sizes = {len(leaf) if leaf.dim() else None for leaf in leaves}
    if len(sizes) != 1 or None in sizes:
        seen = ", ".join(str(tuple(leaf.shape)) for leaf in leaves) or "none"
        raise InvalidLoss(
            "task_gradient: every tensor of support and query needs a leading axis of tasks, of "
            f"the same length; shapes seen: {seen}. Stack the batches of tasks with torch.stack."
        )
    return sizes.pop()  # type: ignore[return-value]
