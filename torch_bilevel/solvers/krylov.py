"""One step of Arnoldi's method, shared by Lanczos steps and GMRES."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of w beside an orthonormal basis:  w − Vᵀh  with  h = V w.

    Gram–Schmidt, done twice. Once loses orthogonality where little of w is left; twice is
    orthogonal to rounding (Giraud, Langou & Rozložník 2005), as modified Gram–Schmidt done twice
    is, in four matrix products instead of one scalar product per vector.

    Args:
        w: a vector, shape ``(n,)``.
        basis: V, orthonormal rows, shape ``(k, n)``.

    Returns:
        What is left, shape ``(n,)``, and h, shape ``(k,)``.

    Example:
        >>> import torch
        >>> w, h = orthogonalise(torch.tensor([3., 4.]), torch.tensor([[1., 0.]]))
        >>> w, h
        (tensor([0., 4.]), tensor([3.]))
    """
    h = basis @ w
    w = w - h @ basis
    again = basis @ w
    return w - again @ basis, h + again


def small_dtype(b: Tensor) -> torch.dtype:
    """The dtype of the small matrices: LAPACK has no 16-bit routines."""
    return torch.promote_types(b.dtype, torch.float32)
