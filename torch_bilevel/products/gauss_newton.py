"""Gauss–Newton products: the model linearised, the curvature of its loss kept.

With outputs z(x, y) and g = ℓ(z, x, y), the generalised Gauss–Newton matrix is the Hessian without
the curvature of the model (Schraudolph 2002),

    B = [Z; I]ᵀ ∇²ℓ [Z; I],    Z = ∂z/∂y,        H = B + Σ_k ∂_{z_k}ℓ ∇²_yy z_k

positive semi-definite where ℓ is convex in (z, y), so that CG meets no negative curvature, and
equal to H where the model is linear in y. J is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import BilevelError, Disconnected, InvalidLoss, SolverLimit
from ..ops import cut_by, model_output
from ..problem import (
    BilevelProblem,
    Call,
    WeightedCall,
    added,
    like,
    pulled,
    scalar,
)
from .base import Products, Substitute, refuse_maps

CONVEX = (
    F.cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.mse_loss,
    F.huber_loss,
    F.smooth_l1_loss,
    F.poisson_nll_loss,
    F.soft_margin_loss,
)
"""Losses that are convex in their first argument, the outputs."""


@dataclass(frozen=True)
class GaussNewton(Products):
    """Products with the Gauss–Newton matrix instead of H, and with the exact J.

    Needs: outputs that are known: a loss of ``torch.nn.functional`` (cross_entropy, mse_loss, ...),
    an operation of `torch_bilevel.ops`, or `model_output` around them; with other terms that read
    outputs (a penalty on logits) mark them, else the model's curvature in those terms stays. Costs:
    about 4/3 of a gradient a product for dense layers. Approximate unless the model is linear in
    its parameters.

    Example:
        >>> import torch_bilevel as tb
        >>> str(tb.GaussNewton())
        'gauss_newton'
    """

    name: ClassVar[str] = "gauss_newton"
    note: ClassVar[str | None] = "Gauss–Newton matrix instead of H"
    words: ClassVar[str] = (
        "Gauss–Newton: the model linearised, the loss curved; J exact"
    )

    def linearize(
        self, problem: BilevelProblem, calls: Sequence[WeightedCall]
    ) -> GaussNewtonPoint:
        """See `Products.linearize`.

        Raises:
            InvalidLoss: no model outputs are known.
            NonSymmetricSystem: the inner problem is the fixed point of a map.
        """
        refuse_maps(self, calls)
        return GaussNewtonPoint(problem, calls)


class _Cutting(TorchFunctionMode):
    """Marks the first argument of losses that are convex in it, unless it comes from a mark."""

    def __init__(self, piece: _Piece):
        super().__init__()
        self.piece = piece

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in CONVEX and torch._C._are_functorch_transforms_active():
            self.piece.transformed = True
        elif func in CONVEX:
            z = args[0] if args else kwargs["input"]
            if not self.piece.comes_from_a_mark(z):
                z = model_output(z)
            args, kwargs = (
                (z, *args[1:]),
                {k: kwargs[k] for k in kwargs if k != "input"},
            )
        return func(*args, **kwargs)


class _Piece:
    """One call: its model and its loss, as two graphs.

    Attributes:
        outputs: z, with the graph of the model.
        leaves: z', the same values, where the graph of the loss begins.
        seeds: u = ∂_z ℓ, leaves of the graph of Zᵀu.
        to_outputs: ∂_z ℓ with graph.
        direct: ∂_y ℓ at fixed z, with graph, None where not reached.
        pulled: Zᵀu with graph, None where not reached.
    """

    def __init__(self, problem: BilevelProblem, call: Call, weight: Any):
        self.problem = problem
        self.transformed = False  # a known loss was called inside a function transform
        self.outputs: list[Tensor] = []
        self.leaves: list[Tensor] = []
        with problem.evaluating(call):
            try:
                with cut_by(self._cut), _Cutting(self):
                    loss = scalar(problem.run(call), call.name)
            except RuntimeError as error:
                if isinstance(error, BilevelError) or not self.outputs:
                    raise
                raise InvalidLoss(
                    f"products='gauss_newton' cuts the graph at the outputs of the model, and "
                    f"{call.name!r} does not bear it: {error} A loss that differentiates by "
                    "itself needs products='double_backward'."
                ) from error
            if not self.outputs:
                raise InvalidLoss(_unmarked(call.name, self.transformed))
            inner = problem.inner.tensors
            found = _gradients(
                [loss], [like(weight, loss)], [*self.leaves, *inner], create_graph=True
            )
            self.problem.look_through(call, found, [loss, *self.outputs], self.leaves)
            count = len(self.leaves)
            self.to_outputs = [
                torch.zeros_like(leaf) if part is None else part
                for leaf, part in zip(self.leaves, found[:count], strict=True)
            ]
            self.direct = found[count:]
            self.seeds = [part.detach().requires_grad_() for part in self.to_outputs]
            self.pulled = _gradients(self.outputs, self.seeds, inner, create_graph=True)
        parts = zip(self.direct, self.pulled, strict=True)
        if all(a is None and b is None for a, b in parts):
            raise Disconnected(
                f"The inner loss {call.name!r} does not depend on any inner parameter."
            )

    def comes_from_a_mark(self, z: Tensor) -> bool:
        """Whether z was computed from outputs that are marked already."""
        if not self.leaves or not z.requires_grad:
            return False
        found = _gradients([z], [torch.ones_like(z)], self.leaves)
        return any(part is not None for part in found)

    def _cut(self, z: Tensor) -> Tensor:
        """The end of the model's graph, and the beginning of the loss's."""
        if torch._C._are_functorch_transforms_active():
            self.transformed = True
            return z
        if not z.requires_grad:
            return z
        if self.comes_from_a_mark(z):
            raise InvalidLoss(
                "products='gauss_newton': one output of the model is computed from another that "
                "was marked before. Mark only the last ones with tb.model_output."
            )
        leaf = z.detach().requires_grad_()
        self.outputs.append(z)
        self.leaves.append(leaf)
        return leaf.clone()  # which may be written to

    def product(
        self, v: Sequence[Tensor], outer: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """(B v, J v), given and found tensor by tensor."""
        inner = self.problem.inner.tensors
        reach = [t for t in outer if t is not None]
        m, p = len(self.leaves), len(inner)
        # w = Z v, and ∂_x⟨Zᵀu, v⟩
        found = _gradients(self.pulled, v, [*self.seeds, *reach])
        w, C1 = found[:m], found[m:]
        # ∂_(z, y, x)(⟨∂_z ℓ, w⟩ + ⟨∂_y ℓ, v⟩)
        found = _gradients(
            [*self.to_outputs, *self.direct], [*w, *v], [*self.leaves, *inner, *reach]
        )
        t, direct, C2 = found[:m], found[m : m + p], found[m + p :]
        # (∂z/∂(y, x))ᵀ t
        found = _gradients(self.outputs, t, [*inner, *reach])
        H = added(direct, found[:p])
        J = iter(added(added(C1, C2), found[p:]))
        return H, [None if tensor is None else next(J) for tensor in outer]


def _unmarked(name: str, transformed: bool) -> str:
    if transformed:
        return (
            f"products='gauss_newton' needs the outputs of the model, and {name!r} computes them "
            "inside torch.vmap or another function transform, out of reach. Compute them outside: "
            "z = tb.model_output(torch.einsum('tnd,tcd->tnc', x, heads)), then "
            "torch.vmap(F.cross_entropy)(z, y).sum()."
        )
    return (
        f"products='gauss_newton' needs to know the outputs of the model, and {name!r} calls none "
        f"of the losses that mark them ({', '.join(f.__name__ for f in CONVEX)}). Mark them "
        "yourself: z = tb.model_output(model(x))."
    )


class GaussNewtonPoint(Substitute):
    """Products with the Gauss–Newton matrix."""

    def __init__(self, problem: BilevelProblem, calls: Sequence[WeightedCall]):
        super().__init__(problem, calls)
        self.pieces = [_Piece(problem, call, weight) for call, weight in calls]

    @cached_property
    def gradient(self) -> Tensor:
        """See `Point.gradient`."""
        total: list[Tensor | None] = []
        for piece in self.pieces:
            for parts in (piece.direct, piece.pulled):
                detached = [None if p is None else p.detach() for p in parts]
                total = added(total, detached)
        return self.problem.inner.layout.flatten(total)

    def product(self, v: Tensor, inner: bool, outer: bool) -> tuple[Tensor, Tensor]:
        """See `Point.product`."""
        problem = self.problem
        H: list[Tensor | None] = [None] * len(problem.inner.tensors)
        J: list[Tensor | None] = [None] * len(problem.outer.tensors)
        direct = problem.direct if outer else [None] * len(J)
        for piece in self.pieces:
            Hv, Jv = piece.product(problem.inner.layout.split(v), direct)
            H, J = added(H, Hv), added(J, Jv)
        if outer:
            self.reach(J)
        return self.flat(H, J, inner, outer)

    def factors(self, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """(Z, D, λ) with B = Zᵀ D Z + diag(λ), Z of shape (outputs, parameters).

        Args:
            limit: the most numbers Z may have.

        Raises:
            InvalidLoss: the curvature outside the outputs is not diagonal.
            SolverLimit: Z would be larger.
        """
        layout = self.problem.inner.layout
        count = sum(leaf.numel() for piece in self.pieces for leaf in piece.leaves)
        if count * max(layout.numel, count) > limit:
            raise SolverLimit(
                f"'sample_space' would build a {count} × {layout.numel} matrix (limit {limit:,} "
                "numbers). Use 'cg', or raise max_bytes."
            )
        inner = self.problem.inner.tensors
        blocks, curvatures = [], []
        for piece in self.pieces:
            m = sum(leaf.numel() for leaf in piece.leaves)
            rows = [
                part.reshape(m, *leaf.shape)
                for part, leaf in zip(
                    torch.eye(m, dtype=layout.dtype, device=layout.device).split(
                        [leaf.numel() for leaf in piece.leaves], 1
                    ),
                    piece.leaves,
                    strict=True,
                )
            ]
            rows = [r.to(leaf) for r, leaf in zip(rows, piece.leaves, strict=True)]
            Z = _gradients(piece.outputs, rows, inner, is_grads_batched=True)
            D = _gradients(piece.to_outputs, rows, piece.leaves, is_grads_batched=True)
            blocks.append(_matrix(Z, inner, m, layout.dtype))
            curvatures.append(_matrix(D, piece.leaves, m, layout.dtype))
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(layout.numel, generator=generator).to(
            layout.device, layout.dtype
        )
        Z, D = torch.cat(blocks), torch.block_diag(*curvatures)

        def rest(v: Tensor) -> Tensor:
            return self.product(v, True, False)[0] - Z.T @ (D @ (Z @ v))

        diagonal = layout.zeros()  # λ: exactly zero where the loss has no penalty
        for piece in self.pieces:
            ones = [torch.ones_like(part) for part in inner]
            layout.add(diagonal, _gradients(piece.direct, ones, inner))
        scale = torch.linalg.vector_norm(self.product(probe, True, False)[0])
        error = torch.linalg.vector_norm(rest(probe) - diagonal * probe)
        tolerance = torch.finfo(layout.dtype).eps ** 0.5
        if bool(error > tolerance * scale):
            raise InvalidLoss(
                "The inner loss has curvature in the parameters besides that of its outputs, which "
                "is not diagonal (an off-diagonal penalty, or one that multiplies the outputs). A "
                "solve in the space of the outputs does not know it; use 'cg'."
            )
        return Z, D, diagonal


def _matrix(
    parts: Sequence[Tensor | None], likes: Sequence[Tensor], rows: int, dtype: Any
) -> Tensor:
    flat = [
        torch.zeros(rows, like_.numel(), dtype=dtype, device=like_.device)
        if part is None
        else part.reshape(rows, -1).to(dtype)
        for part, like_ in zip(parts, likes, strict=True)
    ]
    return torch.cat(flat, 1)


def _gradients(
    outputs: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    wanted: Sequence[Tensor],
    **options: bool,
) -> list[Tensor | None]:
    """``autograd.grad`` of those outputs that have a graph; the graph stays."""
    (found,) = pulled(outputs, weights, wanted, retain_graph=True, **options)
    return found
