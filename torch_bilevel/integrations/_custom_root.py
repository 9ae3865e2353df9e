"""TorchOpt's ``custom_root`` on this library's implicit differentiation.

F(y*(θ), θ) = 0  ⇒  ∂y*/∂θ = −(∂_y F)⁻¹ ∂_θ F
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.utils import _pytree as pytree

from ..func.root import implicit_root
from ..func.trees import detached
from ..solvers import CG, CGNR, Direct, Solver
from ..solvers.base import Memory, Operator, Solution, relative, solution


def custom_root(
    optimality_fn: Callable[..., Any],
    argnums: int | tuple[int, ...],
    has_aux: bool = False,
    solve: Any = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``torchopt.diff.implicit.custom_root`` with this library's implicit differentiation.

    F(y*(θ), θ) = 0  ⇒  ∂y*/∂θ = −(∂_y F)⁻¹ ∂_θ F, for every θ in ``argnums``.

    Same call, and beyond it: works under ``vmap``, ``grad``, ``jacrev`` and ``jvp`` of
    ``torch.func``, more than once; parameters, arguments and solution are pytrees of tensors; 0-d
    tensors have their derivative (TorchOpt's is −0.0); a linear system that was not solved gives a
    warning. Without ``solve``, GMRES takes the place of TorchOpt's CG on the normal equations.

    Args:
        optimality_fn: F, ``optimality_fn(params, *args)``, a pytree like ``params``.
        argnums: the arguments of the solver to differentiate, counted from ``params``, which is 0
            and the start only. Others are constants.
        has_aux: the solver returns ``(solution, aux)``; ``aux`` is passed on without derivative.
        solve: how to solve the linear system: ``torchopt.linear_solve.solve_cg()``,
            ``solve_normal_cg()`` or ``solve_inv()`` (their ``maxiter`` and ``rtol`` count, ``atol``
            does not: a small right-hand side would be answered by zero); a name such as
            ``"cg(max_steps=50)"`` or a solver of this library; or ``solve(matvec, b) -> x`` on
            flat vectors.

    Returns:
        A decorator of ``solver(params, *args)``.

    Raises:
        ValueError: ``argnums`` contains 0 or is empty, or an option of ``solve`` cannot be kept.
        TypeError: ``solve`` is not a solver.

    The decorated solver raises UnnamedClosure where ``optimality_fn`` reaches a tensor that
    requires grad and is no argument; TorchOpt takes it for a constant. Detach it.

    Example:
        >>> import torch
        >>> from torch_bilevel.integrations.torchopt import custom_root
        >>> @custom_root(lambda y, theta: y**2 - theta, argnums=1)
        ... def square_root(y, theta):
        ...     return theta.sqrt()
        >>> torch.func.grad(square_root, argnums=1)(torch.tensor(1.0), torch.tensor(4.0))
        tensor(0.2500)
    """
    places = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not places or min(places) < 1:
        raise ValueError(
            f"custom_root(argnums={argnums!r}): arguments are counted from the start, params, "
            "which is 0; the solution does not depend on it. Differentiate others: argnums=1."
        )
    _linear_solver(solve, 1)  # refuse at once

    def decorate(solver_fn: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(solver_fn)
        condition, run = _put(optimality_fn, places), _put(solver_fn, places)

        @functools.cache
        def attached(size: int) -> Callable[..., Any]:
            """The differentiable solver, for systems of this size."""
            solver = _linear_solver(solve, size)
            return implicit_root(condition, solver=solver, has_aux=has_aux)(run)

        @functools.wraps(solver_fn)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            initial, *rest = bound.args
            if max(places) > len(rest):
                raise ValueError(
                    f"custom_root(argnums={argnums!r}): {solver_fn.__name__} was called with "
                    f"{len(rest)} arguments after params; the last one is number {len(rest)}."
                )
            outer = tuple(rest[place - 1] for place in places)
            rest = [None if i in places else a for i, a in enumerate(rest, 1)]
            data = detached((rest, bound.kwargs))
            leaves = pytree.tree_leaves(initial)
            size = sum(t.numel() for t in leaves if isinstance(t, Tensor))
            return attached(size)(initial, outer, data)

        return wrapped

    return decorate


def _put(function: Callable[..., Any], places: tuple[int, ...]) -> Callable[..., Any]:
    """A function of a solver's arguments as one of (params, outer, data)."""
    known = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())

    @functools.wraps(function)
    def of(params: Any, outer: tuple[Any, ...], data: tuple[list[Any], Any]) -> Any:
        values = list(data[0])
        for place, value in zip(places, outer, strict=True):
            values[place - 1] = value
        named = {k: v for k, v in data[1].items() if takes_all or k in known}
        return function(params, *values, **named)

    return of


def _linear_solver(solve: Any, size: int) -> str | Solver:
    """The solver that ``solve=`` of `custom_root` stands for, for systems of this size."""
    if solve is None:
        return "gmres(max_steps=50, rtol=1e-8)"
    if isinstance(solve, (str, Solver)):
        return solve
    if not callable(solve):
        raise TypeError(
            f"custom_root(solve={solve!r}): it is torchopt.linear_solve.solve_cg(), "
            "solve_normal_cg() or solve_inv(), a solver of this library or its name, or a "
            "function solve(matvec, b)."
        )
    # TorchOpt's are partial functions of its own functions
    made = getattr(solve, "func", solve)
    if not str(getattr(made, "__module__", "")).startswith("torchopt.linear_solve"):
        return _Given(solve)
    if not hasattr(solve, "keywords"):
        raise TypeError(
            f"custom_root(solve={made.__name__}): call it, solve={made.__name__}()."
        )
    options = {
        k: v for k, v in solve.keywords.items() if v is not None and v is not False
    }
    if {"init", "M"} & options.keys():
        raise ValueError(
            "custom_root(solve=...): init= and M= of TorchOpt's solvers are trees like its tuples "
            "of tensors; here systems are flat vectors. Leave them out, or give a solver of "
            "this library."
        )
    if options.keys() <= {"maxiter", "rtol", "atol"}:
        steps = options.get("maxiter", 10 * max(size, 1))  # TorchOpt's default
        rtol = options.get("rtol", 1e-5)
        known = {
            "_solve_cg": lambda: CG(steps, rtol),
            "_solve_normal_cg": lambda: CGNR(steps, rtol),
            "_solve_inv": Direct,
        }
        return known[made.__name__]()
    return _Given(solve)


@dataclass(frozen=True)
class _Given(Solver):
    """A function ``solve(matvec, b) -> x`` as a solver."""

    function: Callable[..., Any]

    name: ClassVar[str] = "given"
    uses_start: ClassVar[bool] = False

    def solve(
        self,
        operator: Operator,
        b: Tensor,
        x0: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Solution:
        """See `Solver.solve`."""
        with warnings.catch_warnings():
            # TorchOpt calls torch under a name that is deprecated
            warnings.simplefilter("ignore", FutureWarning)
            value = self.function(operator, b)
        residual = relative(b - operator(value), b)
        return solution(value, residual, converged=residual <= 1e-4)
