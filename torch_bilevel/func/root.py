"""Any solver's result as a differentiable function: the implicit function theorem for pytrees.

    F(y*, x) = 0    ⟹    ∂y*/∂x = −(∂_y F)⁻¹ ∂_x F

Two functions for autograd share the work. One runs the solver: it has no derivative, sees plain
tensors under any transform, and takes the lanes of ``vmap`` one after the other. The other carries
the derivative (see `equations`) and is batched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _registry
from ..errors import UnnamedClosure, UnsupportedParameter
from ..second_order import opaque
from ..solvers import REGISTRY as SOLVERS
from ..solvers import Solver
from .closures import Named
from .equations import Equation, System, implicit
from .evaluation import (
    Conditions,
    evaluating,
    name_of,
    reaches_others,
    refuse_inference_mode,
)
from .matrices import Jacobian, Matrix, Trust
from .solving import Run, Undifferentiated
from .trees import Flat, Operands

DEFAULT = "gmres(max_steps=50, rtol=1e-8)"
Solve = Callable[..., Any]
UNCOMPILED = (
    "the result of implicit_root cannot be part of a fullgraph: it may be found by any program, "
    "and its derivative solves a linear system; call torch.compile without fullgraph=True, or "
    "compile what is before and after"
)


@dataclass(frozen=True)
class Products:
    """Products with the derivatives of F that a user supplied, of pytrees; see `implicit_root`."""

    hvp: Callable[..., Any] | None = None
    hvp_transpose: Callable[..., Any] | None = None
    cross: Callable[..., Any] | None = None
    cross_transpose: Callable[..., Any] | None = None


class Root(Equation):
    """F(y, x, data) = 0, with θ = (the solution found, tensors of x and data, named tensors)."""

    def __init__(
        self,
        optimality: Callable[..., Any] | None,
        products: Products,
        solver: Solver,
        owner: str,
        flat: Flat,
        operands: Operands,
        named: Named,
        trust: Trust,
    ):
        self.optimality = optimality
        self.products = products
        self.solver = solver
        self.owner = owner
        self.flat = flat
        self.operands = operands
        self.named = named
        self.symmetric = solver.needs_symmetric
        self.conditions = Conditions(operands.tensors)
        self.trust = trust
        self.count = len(operands.tensors)
        outer, _ = operands.tree(operands.tensors)
        tensors = [x for x in pytree.tree_leaves(outer) if isinstance(x, Tensor)]
        self.shapes = [tuple(x.shape) for x in tensors]  # of the tensors of x

    def solve(self, *theta: Tensor) -> tuple[Tensor, ...]:
        """The solution found."""
        return (theta[0].clone(),)

    def arguments(self, theta: Sequence[Tensor]) -> Any:
        """(x, *data)."""
        outer, data = self.operands.tree(theta[1 : 1 + self.count])
        return outer, *data

    def residual(self, y: Tensor, *theta: Tensor) -> Tensor:
        """F(y, x, data), flat."""
        if self.optimality is None:
            raise UnsupportedParameter(
                f"{self.owner}: this derivative needs the condition itself, and optimality is "
                "None. Give optimality=, or all of hvp=, cross= (reverse mode) and "
                "cross_transpose= (forward mode)."
            )
        named = theta[1 + self.count :]
        with evaluating(), self.conditions(), self.named.replaced_by(named):
            found = self.optimality(self.flat.tree(y), *self.arguments(theta))
            return self.flat.vector(found, "what the optimality condition returned")

    def tangent(self) -> System:
        """∂_y F; see `Equation.tangent`."""
        matrix: Matrix = Jacobian(self.residual, self.symmetric, self.trust)
        if self.products.hvp is not None:
            matrix = Supplied(self)
        return System(matrix, self.solver, self.owner)

    def transposed(self) -> System:
        """(∂_y F)ᵀ; see `Equation.transposed`."""
        return replace(self.tangent(), transpose=not self.symmetric)

    def pull(
        self, y: Tensor, theta: Sequence[Tensor], u: Tensor
    ) -> list[Tensor | None]:
        """(∂_θ F)ᵀ u; see `Equation.pull`."""
        if self.products.cross is None:
            return super().pull(y, theta, u)
        found = self.products.cross(
            self.flat.tree(u), self.flat.tree(y), *self.arguments(theta)
        )
        bars: list[Tensor | None] = [None] * len(theta)
        bars[1 : 1 + len(self.shapes)] = self._outer_leaves(found, "cross")
        return bars

    def push(
        self, y: Tensor, theta: Sequence[Tensor], dots: Sequence[Tensor | None]
    ) -> Tensor | None:
        """∂_θ F θ̇; see `Equation.push`."""
        if self.products.cross_transpose is None:
            return super().push(y, theta, dots)
        count = len(self.shapes)
        pairs = zip(theta[1 : 1 + count], dots[1 : 1 + count], strict=True)
        filled = [torch.zeros_like(t) if d is None else d for t, d in pairs]
        outer = self.operands.tree([*filled, *theta[1 + count : 1 + self.count]])[0]
        found = self.products.cross_transpose(
            outer, self.flat.tree(y), *self.arguments(theta)
        )
        return self.flat.vector(found, "what cross_transpose returned")

    def _outer_leaves(self, found: Any, name: str) -> list[Tensor]:
        """What a supplied product returned for x, as a list."""
        leaves = [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor)]
        shapes = [tuple(x.shape) for x in leaves]
        if shapes != self.shapes:
            raise UnsupportedParameter(
                f"{self.owner}: {name} must return a pytree like outer, with tensors of shapes "
                f"{self.shapes}; got {shapes}."
            )
        return leaves


class Supplied(Matrix):
    """∂_y F by the products that a user gave."""

    def __init__(self, root: Root):
        self.root = root
        self.symmetric = root.symmetric

    def product(self, v: Tensor, *theta: Tensor) -> Tensor:
        """See `Matrix.product`."""
        return self._apply(self.root.products.hvp, v, theta)

    def transposed(self, v: Tensor, *theta: Tensor) -> Tensor:
        """See `Matrix.transposed`."""
        if self.root.products.hvp_transpose is not None:
            return self._apply(self.root.products.hvp_transpose, v, theta)
        if self.symmetric:
            return self.product(v, *theta)
        # the transpose of a linear map is the backward pass through it
        zero = torch.zeros_like(v)
        return torch.func.vjp(lambda v: self.product(v, *theta), zero)[1](v)[0]

    def _apply(self, given: Any, v: Tensor, theta: Sequence[Tensor]) -> Tensor:
        y, *others = theta
        flat, arguments = self.root.flat, self.root.arguments(others)
        with evaluating():
            found = given(flat.tree(v), flat.tree(y), *arguments)
        return flat.vector(found, "what a supplied product returned")


def _solver(given: str | Solver) -> Solver:
    """A solver of linear systems by its name, with its own options.

    Raises:
        UnknownName: there is none of that name, or it has no such option.
        UnsupportedParameter: it is no pure function of one system.
    """
    known = {k: c for k, c in SOLVERS.items() if c.pure and c.solves}
    if isinstance(given, str):
        name, options = _registry.parse(given, known, "solver")
        return _registry.build(known[name], options, name)
    if not isinstance(given, Solver) or not (given.pure and given.solves):
        raise UnsupportedParameter(
            f"implicit_root(solver={given!r}): the derivative solves one linear system; write "
            f"the name of a solver ({', '.join(sorted(known))}) or an object such as tb.CG()."
        )
    return given


def implicit_root(
    optimality: Callable[..., Any] | None,
    *,
    solver: str | Solver = DEFAULT,
    has_aux: bool = False,
    parameters: Any = (),
    hvp: Callable[..., Any] | None = None,
    hvp_transpose: Callable[..., Any] | None = None,
    cross: Callable[..., Any] | None = None,
    cross_transpose: Callable[..., Any] | None = None,
) -> Callable[[Solve], Solve]:
    r"""Make what a solver returns differentiable, as the root of an optimality condition.

    ::

        F(y, x, *data) = 0  at  y = solve(initial, x, *data)

    A decorator of ``solve(initial, outer, *data) -> solution``: SciPy, a loop, a C library; it is
    called with plain tensors without derivative, and may return NumPy arrays. The result is
    differentiable in ``outer``, in every floating-point tensor of ``data`` and in ``parameters``,
    in reverse and forward mode, any number of times except forward over forward; ``initial`` has no
    derivative. It is that of the exact root, and as far off as F is from 0.

    Works under ``vmap`` (the solver runs lane after lane), ``grad``, ``jvp``, ``jacrev``,
    ``hessian``. ``torch.compile`` breaks the graph around it.

    Decorate where the module is at hand that F reaches (in ``forward``, not ``__init__``): a
    deepcopy of a module keeps functions that were made in the original. Rows of a batch in one
    solution are one linear system, as hard as the hardest of them; ``vmap`` makes it one each.

    Costs: the solver; one evaluation of F a call; for a derivative one linear solve, with a product
    of about one gradient of F a step, and one of F.

    Args:
        optimality: F, ``(solution, outer, *data) -> pytree like solution``, for example
            ``torch.func.grad(inner_loss)``. None where all products that are used are supplied.
        solver: of linear systems, a name with options or an object. Names that need a symmetric
            matrix, such as ``"cg"`` and ``"minres"``, say that ∂_y F is symmetric (F a gradient).
        has_aux: ``solve`` returns (solution, aux); aux passes through, without derivative.
        parameters: modules or tensors that F or ``solve`` reach by closure and that are to be
            differentiated; not with supplied products.
        hvp: ``(v, solution, outer, *data)`` ↦ ∂_y F v, instead of differentiating F.
        hvp_transpose: the same for (∂_y F)ᵀ; left out, it is derived from ``hvp``.
        cross: ``(u, solution, outer, *data)`` ↦ (∂_x F)ᵀ u, a pytree like outer; then data has no
            derivative.
        cross_transpose: ``(w, solution, outer, *data)`` ↦ ∂_x F w, for forward mode.

    Returns:
        The decorator.

    Raises:
        UnnamedClosure: F reaches a tensor that is differentiated and not in ``parameters``.
        ForwardOverForward: two forward modes are nested.
        UnknownName: no solver or option has that name.
        UnsupportedParameter: the solution has a leaf that is no floating-point tensor, or F returns
            another structure.

    Warns:
        UnsolvedWarning: the linear system of a derivative was not solved.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> @tb.func.implicit_root(lambda y, x: y**2 - x)
        ... def root(initial, x):
        ...     return x.sqrt().numpy()              # any program
        >>> x = torch.tensor(4.)
        >>> torch.func.grad(root, argnums=1)(torch.tensor(1.), x)
        tensor(0.2500)
    """
    chosen = _solver(solver)
    products = Products(hvp, hvp_transpose, cross, cross_transpose)
    if parameters != () and (products != Products() or optimality is None):
        raise UnsupportedParameter(
            "implicit_root(parameters=...) with supplied products: they say nothing of the "
            "parameters, whose derivative would be missing. Pass the parameters in outer."
        )

    def decorate(solve: Solve) -> Solve:
        owner = f"implicit_root of {name_of(solve)}"

        trust = Trust()

        def call(initial: Any, outer: Any, *data: Any) -> Any:
            refuse_inference_mode(owner)
            named = Named(parameters, owner)
            arguments = Operands((initial, outer, data))
            run = Run(solve, arguments, initial, named)
            found = Undifferentiated.apply(run, *arguments.tensors, *named.tensors)
            assert run.returned is not None
            whole = run.returned.tree(found)  # type: ignore[arg-type]
            solution, aux = whole if has_aux else (whole, None)
            flat, operands = Flat(solution, "solution"), Operands((outer, data))
            root = Root(
                optimality, products, chosen, owner, flat, operands, named, trust
            )
            theta = (flat.vector(solution), *operands.tensors, *named.tensors)
            operands.tensors = []  # not to be kept alive by what was found
            if optimality is not None:
                _refuse_unnamed(root, theta)
            (y,) = implicit(root, *theta)
            return (flat.tree(y), aux) if has_aux else flat.tree(y)

        hidden = opaque(UNCOMPILED)(call)

        @functools.wraps(solve)
        def solved(initial: Any, outer: Any, *data: Any) -> Any:
            return hidden(initial, outer, *data)

        return solved

    return decorate


def implicit_fixed_point(
    fixed_point_map: Callable[..., Any],
    *,
    solver: str | Solver = DEFAULT,
    has_aux: bool = False,
    parameters: Any = (),
) -> Callable[[Solve], Solve]:
    r"""Make what a solver returns differentiable, as the fixed point of a map.

    ::

        y = T(y, x, *data)    ⟹    ∂y/∂x = (I − ∂_y T)⁻¹ ∂_x T

    `implicit_root` of ``y − T(y, x, *data)``, for deep equilibria and algorithms that iterate a
    map.

    Args:
        fixed_point_map: T, ``(solution, outer, *data) -> pytree like solution``.
        solver: as in `implicit_root`; ``"neumann"`` and ``"richardson"`` also converge, where T
            contracts.
        has_aux: as in `implicit_root`.
        parameters: as in `implicit_root`.

    Returns:
        The decorator of ``solve(initial, outer, *data)``.

    Raises:
        UnnamedClosure: as in `implicit_root`.
        ForwardOverForward: as in `implicit_root`.
        UnsupportedParameter: as in `implicit_root`.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> def average(y, x):                      # Heron's map, whose fixed point is √x
        ...     return (y + x / y) / 2
        >>> @tb.func.implicit_fixed_point(average)
        ... def root(initial, x):
        ...     y = initial
        ...     for _ in range(20):
        ...         y = average(y, x)
        ...     return y
        >>> torch.func.grad(root, argnums=1)(torch.tensor(1.), torch.tensor(4.))
        tensor(0.2500)
    """

    def residual(y: Any, outer: Any, *data: Any) -> Any:
        flat = Flat(y, "solution")
        mapped = flat.vector(fixed_point_map(y, outer, *data), "what the map returned")
        return flat.tree(flat.vector(y) - mapped)

    return implicit_root(
        residual, solver=solver, has_aux=has_aux, parameters=parameters
    )


def _refuse_unnamed(root: Root, theta: Sequence[Tensor]) -> None:
    """Look whether F depends on something differentiated or batched that is no argument.

    Raises:
        UnnamedClosure: it does.
    """

    def at_the_solution(y: Tensor, *rest: Tensor) -> Tensor:
        return root.residual(y, y, *rest)

    if reaches_others(at_the_solution, theta, root.owner):
        raise UnnamedClosure(
            f"{root.owner}: the optimality condition depends on a tensor that requires a "
            "gradient, or that a transform around differentiates or batches, and that is neither "
            "its outer argument, nor data, nor named; it would be missed. Write "
            "parameters=module (or a list of tensors; name a view itself, not what it is of), "
            "pass it as outer or data, or detach() it."
        )
