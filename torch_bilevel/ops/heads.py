"""Linear systems of many few-shot heads at once, as implicit meta-learning has them.

(H_t + λ_t I) v_t = b_t,    H_t the Hessian in (W_t, b_t) of  (1/n) Σ_i ω_i ℓ(W_t x_i + b_t, t_i)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..errors import InvalidLoss, KernelUnavailable
from ..kernels import head_cg
from ..kernels.head_cg import Heads
from ..kernels.language import unavailable
from ..kernels.one_pass import Direction
from .fused import choices
from .linear_cross_entropy import _Indices
from .linear_logistic import _Logistic
from .linear_squared_error import _Squared
from .link import Link

LOSSES: dict[str, Link] = {
    "cross_entropy": _Indices(),
    "logistic": _Logistic(),
    "squared_error": _Squared(),
}


def solve_linear_heads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    b_weight: Tensor,
    b_bias: Tensor | None = None,
    *,
    damping: float | Tensor,
    num_steps: int,
    loss: str = "cross_entropy",
    example_weights: Tensor | None = None,
    kernel: str = "auto",
) -> Heads:
    """Solve (H_t + λ_t I) v_t = b_t for T linear heads by conjugate gradients from zero.

    H_t is the Hessian of a head's mean loss, which for these losses does not depend on targets.
    Without derivative. On CUDA all steps of a task are one program, and all tasks one launch, which
    reads x twice; elsewhere batched matrix products. A task that meets negative curvature (λ_t < 0)
    or has no residual left stays where it is.

    Args:
        x: features, (T, n, d), float32 or float64, as all others.
        weight: of the heads, (T, c, d).
        bias: (T, c) or None.
        b_weight: right-hand sides, (T, c, d).
        b_bias: their parts of the bias, (T, c); None without a bias.
        damping: λ, in units of curvature: a number, or (T,).
        num_steps: of conjugate gradients; each costs the kernel n² c operations a task (n c d for
            d ≤ 64), whatever d is.
        loss: ``"cross_entropy"``, ``"logistic"`` or ``"squared_error"``; the last two are means
            over outputs too.
        example_weights: ω, (T, n).
        kernel: ``"auto"``, ``"torch"`` or ``"one_program"``.

    Returns:
        The solutions as ``value.weight`` and ``value.bias``, and for each task ``num_steps``,
        ``residual`` (relative) and ``negative_curvature``.

    Raises:
        InvalidLoss: shapes or names do not fit.
        KernelUnavailable: the kernel asked for cannot run here.

    Example:
        >>> import torch
        >>> from torch_bilevel.ops import solve_linear_heads
        >>> x, W, b = torch.ones(2, 1, 1), torch.zeros(2, 1, 1), torch.ones(2, 1, 1)
        >>> solve_linear_heads(x, W, None, b, damping=0.75, num_steps=1, loss="logistic").value[0]
        tensor([[[1.]],
        <BLANKLINE>
                [[1.]]])
    """
    _checks.positive_int("solve_linear_heads", "num_steps", num_steps)
    _check(x, weight, bias, b_weight, b_bias, loss, example_weights)
    link, (tasks, n, _), c = LOSSES[loss], x.shape, weight.shape[1]
    with torch.no_grad():
        z = weight @ x.mT if bias is None else weight @ x.mT + bias.unsqueeze(2)
        state = torch.softmax(z, 1) if loss == "cross_entropy" else z
        count = n * c if link.elementwise else n
        scale = x.new_full((tasks, n), 1 / max(count, 1))
        scale = scale if example_weights is None else scale * example_weights
        pull = torch.as_tensor(damping, dtype=x.dtype, device=x.device)
        if pull.shape not in ((), (tasks,)):
            raise InvalidLoss(
                f"solve_linear_heads: damping has shape {tuple(pull.shape)}; it must be a number, "
                f"or ({tasks},) for these {tasks} tasks."
            )
        pull = pull.contiguous()
        b = Direction(b_weight, None if bias is None else b_bias)
        if not tasks:
            none = x.new_zeros(0)
            return Heads(b, none.long(), none, none > 0)
        solve = head_cg.reference
        if _by_kernel(kernel, x, c):
            x, state, scale = x.contiguous(), state.contiguous(), scale.contiguous()
            parts = (None if part is None else part.contiguous() for part in b)
            b, solve = Direction(*parts), head_cg.head_cg  # type: ignore[arg-type]
        return solve(link, x, state, scale, pull, b, num_steps)


def _by_kernel(kernel: str, x: Tensor, classes: int) -> bool:
    if kernel not in ("auto", "torch", "one_program"):
        raise KernelUnavailable(
            f"solve_linear_heads(kernel={kernel!r}): write 'auto', 'torch' or 'one_program'."
        )
    if kernel == "torch" or (kernel == "auto" and x.device.type != "cuda"):
        return False
    why = unavailable(x) or head_cg.suits(x.shape[1], classes)
    if kernel == "auto":
        taken = "'torch'" if why else "'one_program'"
        size = f"{len(x)} tasks of {x.shape[1]} × {x.shape[2]}, {classes} classes"
        choices["solve_linear_heads"] = f"solve_linear_heads by {taken} ({why or size})"
        return why is None
    if why is not None:
        raise KernelUnavailable(
            f"solve_linear_heads(kernel={kernel!r}) cannot run here: {why}. kernel='auto' takes "
            "what can."
        )
    return True


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    b_weight: Tensor,
    b_bias: Tensor | None,
    loss: str,
    example_weights: Tensor | None,
) -> None:
    if loss not in LOSSES:
        raise InvalidLoss(
            f"solve_linear_heads(loss={loss!r}): write {', '.join(map(repr, LOSSES))}."
        )
    if x.dim() != 3 or weight.dim() != 3:
        raise InvalidLoss(
            f"solve_linear_heads: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "they must be (T, n, d) and (T, c, d)."
        )
    (tasks, n, d), c = x.shape, weight.shape[1]
    known = {
        "weight": (weight, (tasks, c, d)),
        "bias": (bias, (tasks, c)),
        "b_weight": (b_weight, (tasks, c, d)),
        "b_bias": (b_bias, (tasks, c)),
        "example_weights": (example_weights, (tasks, n)),
    }
    for name, (tensor, shape) in known.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype):
            raise InvalidLoss(
                f"solve_linear_heads: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                f"with these x and weight it must be {x.dtype} of shape {shape}."
            )
    if (bias is None) != (b_bias is None):
        raise InvalidLoss(
            "solve_linear_heads: give both bias and b_bias, or neither of them."
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise InvalidLoss(
            f"solve_linear_heads: x is {x.dtype}; write x.float(): 16-bit numbers do not carry a "
            "solve."
        )
