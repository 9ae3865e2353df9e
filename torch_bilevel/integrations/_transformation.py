"""A gradient transformation of TorchOpt as the update of one parameter.

    (u, s') = transformation.update(∇_y g, s, params=y);    y ← y + u

Learning rate, weight decay, sign and whether parameters are mixed are hidden in closures. What is
needed of them is found by trying the transformation on small stand-ins for the parameters, in
float64: `Transformation.check` at construction, `Transformation.rest` when an implicit estimator
asks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import NoUpdateRule
from ..inner import Stationarity
from ..inner.arithmetic import root
from ..inner.rule import State

_SCALES = (1.0, 1e3, 1e-3, 1e12)  # of trial gradients: the last is above any threshold
_STEPS = 4

Tensors = tuple[Tensor, ...]


class _SmoothRoot(TorchFunctionMode):
    """√v with derivative 0 where v = 0, in code that calls ``sqrt``."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.sqrt, Tensor.sqrt) and not kwargs:
            return root(args[0])
        if func in (torch.sqrt_, Tensor.sqrt_):
            return args[0].copy_(root(args[0]))
        return func(*args, **(kwargs or {}))


class Transformation:
    """A transformation as the update of one parameter, with what was found out about it."""

    def __init__(self, transformation: Any):
        parts = (getattr(transformation, name, None) for name in ("init", "update"))
        if not all(map(callable, parts)):
            raise TypeError(
                f"Optimizer(params, {transformation!r}): the second argument is a TorchOpt "
                "GradientTransformation such as torchopt.adam(1e-3), with init and update."
            )
        self.transformation = transformation
        self.smooth = True  # autograd gives the derivative of the update
        self._begun: dict[torch.Size, tuple[list[str], list[Any], Any]] = {}
        self._rests: dict[tuple[int, ...], Stationarity] = {}

    def __deepcopy__(self, memo: Any) -> Transformation:
        return self

    def __call__(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: State,
        differentiated: bool = True,
    ) -> tuple[Tensor, State]:
        """(y + u, s') from (y, ∇_y g, s); half the time where it is not differentiated."""
        if not self.smooth and gradient.requires_grad:
            raise NoUpdateRule(
                "The derivative that autograd gives of the TorchOpt transformation is not that of "
                "its update: it detaches something, or rounds its derivative as "
                "use_accelerated_op=True does, so it cannot be unrolled. Use an implicit estimator "
                "such as 'cg', or use_accelerated_op=False."
            )
        y, g = (parameter,), (gradient,)
        names, kinds, spec = self._structure(parameter)
        if state:
            leaves = [_thaw(state.get(n), k) for n, k in zip(names, kinds, strict=True)]
            tree = pytree.tree_unflatten(leaves, spec)
        else:
            tree = self._init(y)
        with _SmoothRoot() if differentiated else contextlib.nullcontext():
            updates, tree = self._apply(g, tree, y)
        leaves = pytree.tree_leaves(tree)
        state = {n: _freeze(v, k) for n, v, k in zip(names, leaves, kinds, strict=True)}
        return torch.add(parameter, updates[0]), state

    def _init(self, parameters: Tensors) -> Any:
        # TorchOpt's moment_requires_grad= is for its own way to unroll
        fresh = self.transformation.init(parameters)
        return pytree.tree_map_only(Tensor, Tensor.detach, fresh)

    def _apply(
        self, gradients: Tensors, state: Any, parameters: Tensors
    ) -> tuple[Tensors, Any]:
        return self.transformation.update(
            gradients, state, params=parameters, inplace=False
        )

    def _structure(self, parameter: Tensor) -> tuple[list[str], list[Any], Any]:
        """Names and kinds of the leaves of the state of a parameter, and its tree."""
        shape = parameter.shape
        if shape not in self._begun:
            fresh = self._init((torch.zeros_like(parameter),))
            leaves, spec = pytree.tree_flatten_with_path(fresh)
            names = [pytree.keystr(path) for path, _ in leaves]
            self._begun[shape] = names, [_kind(leaf) for _, leaf in leaves], spec
        return self._begun[shape]

    @torch.no_grad()
    def check(self, shapes: Sequence[torch.Size]) -> None:
        """Try the transformation on stand-ins for parameters of these shapes.

        Raises:
            ValueError: it mixes parameters, is not a function of its state, or has an option
                that requires grad.
        """
        if not shapes:
            return
        # With the last one twice there are always two, and a norm over both is noticed.
        trials = [_trial(shape) for shape in (*shapes, shapes[-1])]
        steps = [
            (tuple(y for y, _ in trials), tuple(g[k] * scale for _, g in trials))
            for k, scale in enumerate(_SCALES)
        ]
        together = self._play(steps)
        if not _equal(together, self._play(steps)):
            raise ValueError(
                "The TorchOpt transformation is not a function of its state: the same steps "
                "give other updates the second time. torchopt.sgd with dampening= remembers its "
                "first call outside its state; use torch.optim.SGD, or dampening=0."
            )
        alone = [
            self._play([((y[i],), (g[i],)) for y, g in steps])
            for i in range(len(trials))
        ]
        if not _equal(together, [sum(parts, ()) for parts in zip(*alone, strict=True)]):
            raise ValueError(
                "The TorchOpt transformation mixes parameters: applied to each by itself it gives "
                "other updates, so it has no rule for one parameter. If clip_grad_norm is in "
                "the chain, take it out, call torch.nn.utils.clip_grad_norm_ in the loop, and "
                "declare that: optimizer.gradient_transform(tb.clip_grad_norm(max_norm))."
            )
        with torch.enable_grad():
            hidden = any(u.requires_grad for us in self._play(steps) for u in us)
        if hidden:
            raise ValueError(
                "An option of the TorchOpt transformation is a tensor that requires grad, and its "
                "derivative would be lost: the transformation hides it. Use a torch.optim class "
                "and @optimizer.inner_hyperparameters to learn it, or detach it."
            )
        y, g = trials[0]
        # small gradients too, where the ε of Adam counts
        self.smooth = all(self._is_smooth(y, g * size, size) for size in (1.0, 1e-6))

    def _play(self, steps: Sequence[tuple[Tensors, Tensors]]) -> list[Tensors]:
        """The updates of steps, given as (y, g), from a fresh state on."""
        state, found = self._init(steps[0][0]), []
        for y, g in steps:
            with _SmoothRoot():
                updates, state = self._apply(g, state, y)
            found.append(tuple(updates))
        return found

    def _slopes(self, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives of Σu of the last of some steps in its gradient and in its y."""
        before = [((y,), (k,)) for k in g[:-1]]
        with torch.enable_grad():
            y, last = y.clone().requires_grad_(), g[-1].clone().requires_grad_()
            (update,) = self._play([*before, ((y,), (last,))])[-1]
            total = update.sum() + 0 * (y.sum() + last.sum())  # neither is unused
        by_g, by_y = torch.autograd.grad(total, [last, y])
        return by_g, by_y

    def _is_smooth(self, y: Tensor, g: Tensor, size: float) -> bool:
        """Whether autograd's derivative of a step in its gradient is that of its values."""
        change = 1e-5 * _random(y.shape, 1, seed=1)[0]
        up, down = (
            self._play([((y,), (k,)) for k in (*g[:-1], g[-1] + sign * change)])[-1][0]
            for sign in (size, -size)
        )
        difference = (up - down).sum() / 2
        slope = (self._slopes(y, g)[0] * change).sum() * size
        rounding = 1e-14 * torch.linalg.vector_norm(up)
        return bool((slope - difference).abs() <= 1e-4 * difference.abs() + rounding)

    @torch.no_grad()
    def rest(self, shape: torch.Size) -> Stationarity:
        """Where the iteration of a parameter of this shape comes to rest.

        Raises:
            NoUpdateRule: no sign and weight decay explain its updates.
        """
        y, g = _trial(shape)
        key = tuple(y.shape)
        if key not in self._rests:
            self._rests[key] = self._find_rest(y, g)
        return self._rests[key]

    def _find_rest(self, y: Tensor, g: Tensor) -> Stationarity:
        zero = torch.zeros_like(y)
        steps = self._play([((zero,), (g[0],))] * _STEPS)
        along = sum(float((u * g[0]).sum()) for (u,) in steps)
        sign = -1.0 if along > 0 else 1.0
        # u = U(±g + wd·y)  ⇒  ∂u/∂y = ±wd ∂u/∂g;  the ratio is believed once the same steps
        # at y = 0, with g ± wd·y in place of g, are seen to give the same updates
        by_g, by_y = self._slopes(y, g)
        ratio = float((by_g * by_y).sum() / (by_g * by_g).sum()) if by_y.any() else 0.0
        at_y = self._play([((y,), (k,)) for k in g])
        at_zero = self._play([((zero,), (k + ratio * y,)) for k in g])
        if not (along and sign * ratio >= 0 and _equal(at_y, at_zero, rtol=1e-6)):
            raise NoUpdateRule(
                "Trying the TorchOpt transformation does not show where it comes to rest: its "
                "updates are not those of ±∇_y g + wd·y for any weight decay. torchopt.adamw "
                "adds its decay after the preconditioner, and a learning rate that begins with "
                f"{_STEPS} zeros shows nothing. Put the penalty into the registered loss and use "
                "weight_decay=0, use torch.optim.AdamW, or use an unrolled estimator."
            )
        return Stationarity(sign, abs(ratio))


def _random(shape: Sequence[int], count: int, seed: int = 0) -> Tensor:
    """``count`` fixed pseudo-random tensors of a shape in which no size exceeds 2."""
    generator = torch.Generator().manual_seed(seed)
    small = [min(size, 2) for size in shape]
    return torch.randn(
        count, *small, generator=generator, dtype=torch.float64, device="cpu"
    )


def _trial(shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A stand-in for a parameter, and its gradients at some steps."""
    rows = _random(shape, _STEPS + 1)
    return rows[0], rows[1:]


def _equal(one: Sequence[Any], other: Sequence[Any], rtol: float = 1e-12) -> bool:
    """Whether two lists of updates are equal but for rounding, tensor by tensor."""
    a, b = pytree.tree_leaves(list(one)), pytree.tree_leaves(list(other))
    sizes = [float(torch.linalg.vector_norm(v.nan_to_num())) for v in b]
    return len(a) == len(b) and all(
        torch.allclose(u, v, rtol=rtol, atol=rtol * size, equal_nan=True)
        for u, v, size in zip(a, b, sizes, strict=True)
    )


def _kind(leaf: Any) -> torch.dtype | None:
    """The dtype of a counter, which is kept as a number; None for other leaves."""
    count = isinstance(leaf, Tensor) and not (leaf.is_floating_point() or leaf.dim())
    return leaf.dtype if count else None


def _freeze(leaf: Any, kind: torch.dtype | None) -> Any:
    """A leaf of TorchOpt's state as an entry of ours; loading casts tensors, not numbers."""
    return leaf if kind is None else leaf.item()


def _thaw(entry: Any, kind: torch.dtype | None) -> Any:
    return entry if kind is None else torch.tensor(entry, dtype=kind)
