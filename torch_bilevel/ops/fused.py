"""Which kernel computes products, and the kernels as operations that PyTorch can record.

    "torch"      two matrix products, and operations of PyTorch between them
    "rows"       two matrix products, and one kernel between them
    "two_pass"   two kernels that each read x once
    "one_pass"   one kernel that reads x once
    "auto"       on CUDA, in float32, "two_pass" where classes are few; else "rows" on CUDA,
                 and "torch" elsewhere

A kernel that was asked for and cannot run is an error; what "auto" chose can be read in
``optimizer.explain()``. Kernels compute the product with H in W and b, with its derivative J in ω,
and the joint oracle, of losses that are summed. Other derivatives (where x or real targets require
a gradient, of a loss times something differentiated) are PyTorch's, whatever was chosen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import KernelUnavailable
from ..kernels import joint, one_pass, rows, two_pass
from ..kernels.language import tf32, unavailable
from ..kernels.one_pass import Direction
from .link import KEEP, Link

KERNELS = ("auto", "torch", "rows", "two_pass", "one_pass")
CLASSES = {
    "rows": rows.MOST_CLASSES,
    "two_pass": two_pass.MOST_CLASSES,
    "one_pass": one_pass.MOST_CLASSES,
}
VISITS = {  # kernels that read x: the Hessian product and the joint oracle
    "two_pass": (two_pass.hessian_product, two_pass.joint_oracle),
    "one_pass": (one_pass.hessian_product, joint.joint_oracle),
}
choices: dict[str, str] = {}  # operation -> what "auto" took last on CUDA, and why


def resolve(name: str, kernel: str, kind: int | None, x: Tensor, weight: Tensor) -> str:
    """The kernel for an operation on these arguments: one of the names but "auto".

    Args:
        name: of the operation.
        kernel: what was asked for.
        kind: of the loss.
        x: (n, d).
        weight: (c, d).

    Raises:
        KernelUnavailable: it was asked for and cannot run.
    """
    if kernel == "torch" or (kernel == "auto" and x.device.type != "cuda"):
        return "torch"
    if kernel not in KERNELS:
        raise KernelUnavailable(
            f"{name}(kernel={kernel!r}): write {', '.join(map(repr, KERNELS))}."
        )
    why = _obstacle(kind, x, weight)
    if kernel == "auto":
        found = "two_pass" if two_pass.worthwhile(x, weight) else "rows"
        why = why or _too_many(found, weight)
        found = found if why is None else "torch"
        size = (
            f"x of {x.numel() * x.element_size() / 1e6:.3g} MB, {len(weight)} classes"
        )
        choices[name] = f"{name} by {found!r} ({why or size})"
        return found
    why = why or _too_many(kernel, weight)
    if why is not None:
        raise KernelUnavailable(
            f"{name}(kernel={kernel!r}) cannot run here: {why}. kernel='auto' takes what can."
        )
    return kernel


def _too_many(kernel: str, weight: Tensor) -> str | None:
    most = CLASSES[kernel]
    if len(weight) <= most:
        return None
    return f"there are {len(weight)} classes, and a program holds {most}"


def _dense(*parts: Tensor | None) -> list[Any]:
    """Kernels know one stride: contiguous."""
    return [None if part is None else part.contiguous() for part in parts]


def _obstacle(kind: int | None, x: Tensor, weight: Tensor) -> str | None:
    """Why no kernel can be used, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile traces plain operations, which it fuses itself"
    why = unavailable(x)
    if why is not None:
        return why
    if kind is None:
        return "targets are class probabilities, and kernels know class indices"
    if len(x) * len(weight) > KEEP:
        return f"of {len(x)} × {len(weight)} outputs the state is not kept"
    if not x.is_contiguous():
        return (
            f"x has strides {x.stride()}, and kernels read rows that lie side by side"
        )
    if max(len(x), x.shape[1] * len(weight)) >= 2**31:
        return f"x of shape {tuple(x.shape)} is too large for 32-bit indices"
    if not (x.numel() and len(weight)):
        return f"x of shape {tuple(x.shape)} is empty"
    return None


def hessian_product(
    link: Link,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    target: Tensor,
    seed: Tensor,
    share: Tensor | None,
    omega: Tensor | None,
    slopes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """H (weight, bias) of weight and bias, and s κ∘⟨r, u⟩, by the kernel of the link.

    See `curved_rows` and `hessian_product` of ``kernels``; slopes are empty where not asked for.
    """
    return _hessian_product(
        x, weight, bias, state, target, seed, share, omega, _kind(link),
        link.smoothing, link.kernel, slopes, tf32(),
    )  # fmt: skip


def joint_oracle(
    link: Link,
    x: Tensor,
    at: Direction,
    v: Direction,
    target: Tensor,
    share: Tensor | None,
    omega: Tensor | None,
) -> joint.Joint:
    """The joint oracle by the kernel of the link."""
    found = _joint_oracle(
        x, at.weight, at.bias, v.weight, v.bias, target, share, omega, _kind(link),
        link.smoothing, link.kernel, tf32(),
    )  # fmt: skip
    losses, slopes, both, sums = found
    (gW, hW), biases = both, sums[:-1].view(2, -1)
    gb, hb = (None, None) if at.bias is None else biases
    loss = sums[-1].clone()  # no view: losses may be added to in place
    return joint.Joint(loss, losses, slopes, Direction(gW, gb), Direction(hW, hb))


class _Known(NamedTuple):
    """What kernels need to know of a loss."""

    kind: int
    smoothing: float


def _kind(link: Link) -> int:
    assert link.kind is not None
    return link.kind


@torch.library.custom_op("torch_bilevel::linear_hessian_product", mutates_args=())
def _hessian_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, target: Tensor,
    seed: Tensor, share: Tensor | None, omega: Tensor | None, kind: int,
    smoothing: float, kernel: str, slopes: bool, tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    link = _Known(kind, smoothing)
    x, weight, bias, state, target, seed, share, omega = _dense(
        x, weight, bias, state, target, seed, share, omega
    )
    if kernel in VISITS:
        v = Direction(weight, bias)
        W, b, m = VISITS[kernel][0](
            link, x, v, state, target, seed, share, omega, slopes, tf32
        )
    else:
        x = x.to(weight.dtype)
        u = weight @ x.mT
        q, m = rows.curved_rows(
            link, state, target, u, seed, share, omega, bias, slopes
        )
        W, b = q @ x, q.sum(1)
    return W, b, W.new_empty(0) if m is None else m


@_hessian_product.register_fake
def _(
    x,
    weight,
    bias,
    state,
    target,
    seed,
    share,
    omega,
    kind,
    smoothing,
    kernel,
    slopes,
    tf32,
):
    found = torch.empty_like(weight), weight.new_empty(len(weight))
    return *found, weight.new_empty(len(x) if slopes else 0)


@torch.library.custom_op("torch_bilevel::linear_joint_oracle", mutates_args=())
def _joint_oracle(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_v: Tensor,
    bias_v: Tensor | None, target: Tensor, share: Tensor | None, omega: Tensor | None,
    kind: int, smoothing: float, kernel: str, tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    link, classes = _Known(kind, smoothing), len(weight)
    x, weight, bias, weight_v, bias_v, target, share, omega = _dense(
        x, weight, bias, weight_v, bias_v, target, share, omega
    )
    if kernel in VISITS:
        at, v = Direction(weight, bias), Direction(weight_v, bias_v)
        return VISITS[kernel][1](link, x, at, v, target, share, omega, tf32)
    x = x.to(weight.dtype)
    both = torch.cat([weight, weight_v]) @ x.mT
    loss, losses, slopes, left = rows.joint_rows(
        link, both, (bias, bias_v), target, share, omega
    )
    sums = torch.cat([left.sum(1), loss.view(1)])
    return losses, slopes, (left @ x).view(2, classes, -1), sums


@_joint_oracle.register_fake
def _(
    x,
    weight,
    bias,
    weight_v,
    bias_v,
    target,
    share,
    omega,
    kind,
    smoothing,
    kernel,
    tf32,
):
    new, classes = weight.new_empty, len(weight)
    n = len(x)
    return new(n), new(n), new(2, *weight.shape), new(2 * classes + 1)
