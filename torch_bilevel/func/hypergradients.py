"""The hypergradient as a pure function of pytrees.

    ∇Φ(x) = ∂_x f − J v,    (H + δ) v = ∂_y f        at any y, without a loop

with H = ∂²_yy g and J v = ∂_x⟨∇_y g, v⟩, reverse over reverse. The solve is an equation whose
solution is differentiable (see `equations`), so ∇Φ is a function like any other in ``torch.func``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import NeedsLoop, UnnamedClosure, UnsupportedTransform
from ..estimators import Estimator, FiniteDifference, Implicit, Stochastic, parse
from ..problem import scalar
from ..second_order import untraced
from ..solvers import Identity, Operator, Solver, differentiated, transformed
from .equations import System, numbers, solved, told
from .evaluation import (
    Conditions,
    evaluating,
    name_of,
    reaches_others,
    refuse_inference_mode,
)
from .levels import surroundings, tracked
from .matrices import Jacobian, Trust
from .trees import Flat, Operands
from .two_losses import TwoLosses, fits_in_lanes

Loss = Callable[[Any, Any, Any], Any]


class Report(NamedTuple):
    """How a hypergradient was found; 0-d tensors, or one per lane under ``vmap``.

    Attributes:
        loss: the outer loss.
        norm: ‖∇Φ‖.
        residual: ‖∂_y f − H v‖/‖∂_y f‖ of the linear solve; NaN where it is not known.
        solver_steps: steps of the linear solve.
        converged: its tolerance was met.
        negative_curvature: a direction p with pᵀH p < 0 was met; v is the last good iterate.
        curvature: pᵀH p/pᵀp there, or of the last direction.
        diverged: the solver moved away from the solution.
        adjoint: v, a pytree like the inner variables; ``adjoint=`` of the next call.

    All of it is detached: nothing is differentiated through a report.
    """

    loss: Tensor
    norm: Tensor
    residual: Tensor
    solver_steps: Tensor
    converged: Tensor
    negative_curvature: Tensor
    curvature: Tensor
    diverged: Tensor
    adjoint: Any


class Hypergradient:
    """∇Φ of two losses by an estimator; see `hypergradient`, which makes it."""

    def __init__(
        self, inner_loss: Loss, outer_loss: Loss, estimator: Estimator, name: str
    ):
        self.losses = inner_loss, outer_loss
        self.estimator = estimator
        self.solver, self.damping, self.warm = _solver_of(estimator, name)
        self._looked: set[Any] = set()  # inside what closures were looked at
        self._doubtful: set[Any] = set()  # of these, where lanes of a closure may hide
        self._trust = Trust()

    def __repr__(self) -> str:
        names = ", ".join(map(name_of, self.losses))
        return f"hypergradient({names}, estimator={str(self.estimator)!r})"

    def __call__(
        self,
        inner: Any,
        outer: Any,
        inner_batch: Any = None,
        outer_batch: Any = None,
        *,
        adjoint: Any = None,
    ) -> tuple[Any, Report]:
        """The hypergradient at a point, and how it was found."""
        call = self._call if torch.compiler.is_compiling() else untraced(self._call)
        return call(inner, outer, inner_batch, outer_batch, adjoint)

    def _call(
        self, inner: Any, outer: Any, inner_batch: Any, outer_batch: Any, adjoint: Any
    ) -> tuple[Any, Report]:
        refuse_inference_mode("tb.func.hypergradient")
        at_y, at_x = Flat(inner, "inner"), Flat(outer, "outer")
        y, x = at_y.vector(inner), at_x.vector(outer)
        start = None if adjoint is None else at_y.vector(adjoint, "adjoint")
        batches = Operands((inner_batch, outer_batch))
        if torch.compiler.is_compiling():
            y, x, start = _compilable(y, x, start)

        tensors, batches.tensors = batches.tensors, []  # not to be kept alive
        conditions = tuple(Conditions([y, *tensors]) for _ in range(2))  # of g and of f

        def plain(which: int, y: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
            loss, batch = self.losses[which], batches.tree(tensors)[which]
            with evaluating():
                found = loss(at_y.tree(y), at_x.tree(x), batch)
            return scalar(found, name_of(loss)).reshape(()).to(y.dtype)

        def value(which: int, *at: Tensor) -> Tensor:
            with conditions[which]():
                return plain(which, *at)

        if not torch.compiler.is_compiling() and surroundings() not in self._looked:
            self._look(plain, (y, x, *tensors))
        inner, outer = (functools.partial(value, which) for which in (0, 1))
        losses = TwoLosses(inner, outer, self.solver, self.damping)
        start = start if self.warm else None
        if self._at_once(losses, start, (y, x, *tensors)):
            w = y.new_zeros(0) if start is None else start
            found = losses.solve(y, x, w, *tensors)
        else:
            found = self._differentiable(losses, start, (y, x, *tensors))
        gradient, f, v, ended = found
        norm = torch.linalg.vector_norm(gradient.detach())
        report = Report(f.detach(), norm, *told(ended), at_y.tree(v.detach()))
        return at_x.tree(gradient), report

    def _at_once(
        self, losses: TwoLosses, start: Tensor | None, at: tuple[Tensor, ...]
    ) -> bool:
        """Whether nothing differentiates, and all lanes can be computed as one."""
        if torch.compiler.is_compiling() or not self.solver.solves:
            return False
        if tracked(at if start is None else (*at, start)):
            return False
        if not transformed():
            return True
        y, x, *tensors = at
        if not (self.solver.batched and fits_in_lanes(y, x, tensors)):
            return False
        if surroundings() in self._doubtful:
            return False
        return self._trust.check(
            "hypergradient",
            at,
            lambda u: losses.products(y, x, u, *tensors),
            lambda u: losses.products_by_transforms(y, x, u, *tensors),
        )

    def _differentiable(
        self, losses: TwoLosses, start: Tensor | None, at: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """∇Φ, f, v and the numbers of the solve, by operations that can be differentiated."""
        y, x, *tensors = at
        f, f_y, f_x = losses.outer_by_transforms(y, x, *tensors)
        g_y = torch.func.grad(losses.inner)
        v, ended = self._solve(g_y, f_y, start, at)
        if isinstance(self.estimator, FiniteDifference):
            Jv = self._difference(lambda y, x: losses.inner(y, x, *tensors), y, x, v)
        else:
            cross = torch.func.vjp(lambda x: g_y(y, x, *tensors), x)[1]
            (Jv,) = cross(v)
        return f_x - Jv, f, v, ended

    def _look(self, value: Callable[..., Tensor], at: Sequence[Tensor]) -> None:
        """Whether a loss depends on something differentiated or batched that is no argument.

        Once in plain code, and once inside every other nest of transforms, which put other things
        into closures.

        Raises:
            UnnamedClosure: it does.
            BatchChanged: a loss writes into its batch.
        """
        for which, loss in enumerate(self.losses):
            owner = f"{self!r}: {name_of(loss)}"
            found = reaches_others(functools.partial(value, which), at, owner)
            if found is None:
                self._doubtful.add(surroundings())
            elif found:
                raise UnnamedClosure(
                    f"{owner} depends on a tensor that requires a gradient, or "
                    "that a transform around differentiates or batches, and that is none of its "
                    "arguments; it would be missed. Pass it as inner, outer or in the batch (for a "
                    "module: torch.func.functional_call), or detach() it."
                )
        self._looked.add(surroundings())

    def _solve(
        self,
        inner_gradient: Callable[..., Tensor],
        f_y: Tensor,
        start: Tensor | None,
        at: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        """Solve (H + δ) v = ∂_y f; v, and the numbers of the solve."""

        def damped(y: Tensor, *others: Tensor) -> Tensor:
            g_y = inner_gradient(y, *others)
            return g_y + self.damping * y if self.damping else g_y

        if not self.solver.solves:  # v is what it is, an explicit function of ∂_y f
            found = self.solver.solve(Operator(torch.neg, f_y.numel()), f_y)
            return found.value, numbers(found)
        matrix = Jacobian(damped, symmetric=True, trust=self._trust)
        system = System(matrix, self.solver, repr(self), reported=True)
        v, found = solved(system, f_y, start, at)
        return v, found

    def _difference(
        self, g: Callable[[Tensor, Tensor], Tensor], y: Tensor, x: Tensor, v: Tensor
    ) -> Tensor:
        """J v ≈ ‖v‖ [∇_x g(x, y + R v̂) − ∇_x g(x, y − R v̂)]/(2 R)."""
        assert isinstance(self.estimator, FiniteDifference)
        radius, zero = self.estimator.radius, (v == 0).all()
        norm = torch.linalg.vector_norm(torch.where(zero, 1.0, v))
        step = radius * torch.where(zero, 0.0, v / norm)
        g_x = torch.func.grad(g, argnums=1)
        difference = g_x(y + step, x) - g_x(y - step, x)
        return torch.where(zero, 0.0, norm / (2 * radius)) * difference


def hypergradient(
    inner_loss: Loss, outer_loss: Loss, estimator: str | Estimator | Solver = "cg"
) -> Hypergradient:
    r"""The hypergradient of two losses, as a pure function.

        ∇Φ(x) = ∂_x f(x, y) − J v,    (H + δ) v = ∂_y f,    H = ∂²_yy g,    J v = ∂_x⟨∇_y g, v⟩

    ``hypergradient(g, f)(inner, outer, inner_batch, outer_batch, adjoint=None)`` returns
    (gradient, report): a pytree like ``outer`` and a `Report`, whose ``adjoint`` starts the next
    solve. It takes y as it is; ∇Φ is that of y*(x) as far as ∇_y g = 0 there.

    Works under ``vmap`` (every lane stops on its own), ``grad``, ``jvp``, ``jacrev`` and
    combinations, and inside ``torch.compile(fullgraph=True)``. Derivatives of the hypergradient
    take v for the solution of its system, whatever solver found it, and cost a solve more; they
    are those at fixed y: for ∇²Φ let y be the result of `implicit_root`. Compiled, it is not
    differentiated. Nothing raises because of values: look at ``report.converged``, ``.diverged``.

    A loss that draws random numbers (dropout) draws the same ones in every evaluation of a call;
    compiled it draws new ones in every product: pass noise in the batch there.

    Costs: both losses once, a gradient of each, and about a gradient for every product and for J v;
    two evaluations of g more where the result can be differentiated, or under ``vmap`` with another
    solver than "cg". The first call looks at closures: an evaluation more. Under ``vmap`` "cg"
    stops when every lane has; other solvers take all steps that they may.

    Args:
        inner_loss: g, ``(inner, outer, inner_batch) -> scalar``, twice differentiable.
        outer_loss: f, ``(inner, outer, outer_batch) -> scalar``.
        estimator: name, name with options or object, as in `BilevelOptimizer`. Implicit ones with a
            deterministic solver; ``stochastic_neumann``, ``stochastic_richardson`` (on the one
            batch given); ``darts(step_size=...)``. Options about a recorded loop have no effect.

    Returns:
        The function.

    Raises:
        NeedsLoop: the estimator differentiates recorded steps, draws samples or remembers.
        UnsupportedTransform: a derivative of it is compiled.
        BatchChanged: a loss writes into its batch.
        UnnamedClosure: a loss reaches, in its first call, a tensor that requires a gradient and is
            none of its arguments.
        UnsupportedParameter: a leaf of ``inner`` or ``outer`` is no floating-point tensor.
        InvalidLoss: a loss is not a scalar.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> def g(y, x, batch):                       # y* = x/2
        ...     return ((y["w"] - x) ** 2 + y["w"] ** 2).sum()
        >>> def f(y, x, batch):
        ...     return ((y["w"] - batch) ** 2).sum()
        >>> gradient = tb.func.hypergradient(g, f, estimator="cg(max_steps=5)")
        >>> x = torch.tensor([2., 4.])
        >>> found, report = gradient({"w": x / 2}, x, None, torch.zeros(2))
        >>> found, report.adjoint
        (tensor([1., 2.]), {'w': tensor([0.5000, 1.0000])})
    """
    made = parse(estimator)
    written = estimator if isinstance(estimator, str) else str(made)
    return Hypergradient(inner_loss, outer_loss, made, written)


def _solver_of(estimator: Estimator, written: str) -> tuple[Solver, float, bool]:
    """The solver, the damping and whether a start is used.

    Raises:
        NeedsLoop: it is no function of two losses and a point.
    """
    why = "it differentiates, or follows, recorded steps"
    use = "'cg', which needs none, or tb.func.unroll, which takes the steps itself"
    if isinstance(estimator, FiniteDifference):
        if estimator.step_size is not None:
            # one step of gradient descent: the first term of the Neumann series
            return Identity(estimator.step_size), 0.0, False
        why = "its step is the learning rate of an inner optimizer"
        use = "'darts(step_size=0.1)'"
    elif isinstance(estimator, (Implicit, Stochastic)):
        if isinstance(estimator, Implicit) and estimator.certify:
            why = "certify=True needs BilevelOptimizer.smoothness"
            use = "the estimator without it"
        elif estimator.directs:
            why = "it remembers earlier directions"
            use = "the estimator without memory="
        elif not estimator.solver.pure:
            why = f"{type(estimator.solver).__name__} needs more than a linear system"
            use = "'cg', 'direct', 'neumann' or 'stochastic_neumann'"
        else:
            return estimator.solver, estimator.damping, estimator.warm_start
    raise NeedsLoop(
        f"estimator={written!r} cannot be used in tb.func.hypergradient, which sees two "
        f"functions at one point: {why}. Take {use}; or tb.BilevelOptimizer, which has a loop."
    )


def _compilable(y: Tensor, x: Tensor, start: Tensor | None) -> Any:
    """Variables for a compiled hypergradient, which is not differentiated."""
    if differentiated():
        raise UnsupportedTransform(
            "tb.func.hypergradient is differentiated inside torch.compile, which cannot trace the "
            "rule of its derivative. Differentiate outside: torch.func.grad(...) of the function "
            "that is not compiled; torch.compile(vmap(...)) and torch.compile(...) alone work."
        )
    return y.detach(), x.detach(), None if start is None else start.detach()
