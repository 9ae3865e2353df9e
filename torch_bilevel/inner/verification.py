"""Does evaluating a recorded step again give the gradient the step consumed?

If not, something entered the step that the registered losses do not explain, and a
hypergradient computed from them would be that of another program.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..errors import NonFinite, OpaqueStep, ReplayMismatch, UnregisteredTerm
from ..problem import BilevelProblem, WeightedCall, precisions
from .loop import Loop
from .trajectory import StepRecord

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
KINK = 5e-2
"""What an activation that other kernels move across a kink may do to a gradient or a step.

A larger difference is another program's even where the user's own kernels give none: a dropout
mask, say, that only they draw.
"""


def tolerance(problem: BilevelProblem, calls: Sequence[WeightedCall]) -> float:
    """Relative tolerance by the coarsest dtype computed with: 1e-10, 1e-5 or 5e-2."""
    return max(TOLERANCES.get(dtype, 5e-2) for dtype in precisions(problem, calls))


def verify(problem: BilevelProblem, record: StepRecord, loop: Loop) -> None:
    """Recompute the gradient of a recorded step and compare it with the one it consumed.

    Args:
        problem: the problem.
        record: a step with iterate and gradient.
        loop: what was declared about the loop.

    Raises:
        ReplayMismatch: they are parallel but of different length (clipping, a scaler).
        UnregisteredTerm: they differ in direction (a term outside the registered losses).
    """
    layout = problem.inner.layout
    with problem.inner.swapped():
        problem.inner.overwrite(record.values())
        again = problem.inner_gradients(record.calls)
        # Sums of large calls that cancel cannot be compared below the rounding of each.
        parts = (
            [again]
            if len(record.calls) == 1
            else [problem.inner_gradients([call]) for call in record.calls]
        )
        magnitude = torch.stack(
            [torch.linalg.vector_norm(layout.flatten(part)) for part in parts]
        ).sum()
    expected = _expected(problem, record, loop, again)
    actual = layout.flatten(record.gradients())
    error = torch.linalg.vector_norm(expected - actual)
    size = torch.maximum(
        torch.linalg.vector_norm(expected), torch.linalg.vector_norm(actual)
    )
    bound = torch.maximum(
        tolerance(problem, record.calls) * size,
        8 * torch.finfo(layout.dtype).eps * magnitude,
    )
    if bool(error <= bound):
        return
    if bool(error < KINK * size):
        with problem.inner.swapped():
            problem.inner.overwrite(record.values())
            own = problem.inner_gradients(record.calls, once=True)
        own = _expected(problem, record, loop, own)
        if bool(torch.linalg.vector_norm(own - actual) <= bound):
            return
    raise_mismatch(
        problem, record, expected, actual, float(error / size), loop.transform
    )


def _expected(
    problem: BilevelProblem,
    record: StepRecord,
    loop: Loop,
    gradients: Sequence[Tensor | None],
) -> Tensor:
    """What a step would have consumed of some gradients, flat."""
    present = [g is not None for g in record.gradients()]
    with torch.no_grad():
        used = loop.transformed(gradients, present, problem.inner.tensors)
    return problem.inner.layout.flatten(used)


def refuse_unregistered(record: StepRecord) -> None:
    """Refuse a step that consumed the gradient of nothing that is registered.

    Raises:
        UnregisteredTerm: with what to write.
    """
    if not record.calls:
        raise UnregisteredTerm(
            f"Inner step {record.index} since the last outer step consumed a gradient, but "
            "no call of a registered inner loss was back-propagated into .grad of an inner "
            "parameter for it. Compute the training loss through the function registered "
            "with @optimizer.inner_loss and call .backward() (torch.autograd.grad does not "
            "count), or wrap steps that are not part of the inner problem in `with "
            "optimizer.paused():`."
        )


def raise_mismatch(
    problem: BilevelProblem,
    record: StepRecord,
    expected: Tensor,
    actual: Tensor,
    relative: float,
    transform: Any,
) -> None:
    """Explain a gradient that does not match.

    Raises:
        ReplayMismatch: always, or its subclass `UnregisteredTerm`; but
        NonFinite: where either is not finite.
    """
    dot = torch.dot(expected, actual)
    norms = torch.linalg.vector_norm(expected), torch.linalg.vector_norm(actual)
    cosine = (
        float(dot / (norms[0] * norms[1])) if bool(norms[0] * norms[1] > 0) else 0.0
    )
    names = ", ".join(repr(call.name) for call, _ in record.calls)
    if math.isnan(relative):
        raise NonFinite(
            f"The gradient of inner step {record.index} of this window is not finite (registered "
            f"losses {names}). The inner parameters have probably diverged; look at the training "
            "loss, and lower the inner learning rate."
        )
    seen = (
        f"Evaluating inner step {record.index} of this window again does not give the gradient "
        f"the step consumed: relative difference {relative:.2e} (registered losses {names}: "
        f"norm {float(norms[0]):.4g}; consumed: norm {float(norms[1]):.4g}; cosine "
        f"{cosine:.6f})."
    )
    _refuse_averages(seen)
    if compiled_with_dropout(problem):
        raise ReplayMismatch(
            f"{seen} The model is compiled and contains dropout: inductor draws another mask "
            "than eager PyTorch, so the step cannot be evaluated again. Compile with "
            'torch.compile(model, options={"fallback_random": True}).'
        )
    hooked = sum(
        bool(item._backward_hooks)
        for item in (*problem.inner.tensors, *problem.modules.members.values())
    )
    hooks = (
        f" {hooked} inner parameters or modules have hooks (register_hook, "
        "register_full_backward_hook), which are not run again: what they do to gradients would be "
        "done to products with the Hessian too. If they change gradients, say how instead: "
        "optimizer.gradient_transform(tb.clip_grad_value(limit)), or a function of your own."
        if hooked
        else ""
    )
    if cosine > 1 - 1e-6 and norms[0] > 0:
        scaler = (
            "If the loop uses a torch.amp.GradScaler, pass grad_scaler=scaler to the "
            "BilevelOptimizer."
        )
        clipping = (
            "If it clips gradients, say so: "
            "optimizer.gradient_transform(tb.clip_grad_norm(max_norm)). If it scales them after "
            "backward (accumulation), scale the loss instead."
        )
        large = float(norms[0] / norms[1]) > 1000 or float(norms[1] / norms[0]) > 1000
        hint = f"{scaler} {clipping}" if large else f"{clipping} {scaler}"
        if transform is not None:
            hint += (
                " A gradient_transform is declared; it does not describe what happened."
            )
        hint += (
            " If the loss reads a Python value that changed since, pass it as an argument; if an "
            "outer variable was written to since, restart() after writing."
        )
        raise ReplayMismatch(f"{seen} The two are parallel. {hint}{hooks}")
    if hooked:
        raise ReplayMismatch(f"{seen}{hooks}")
    raise UnregisteredTerm(
        f"{seen} The two are not parallel: something else was back-propagated. Move every term "
        "of the training loss (penalties, auxiliary losses) into the registered inner loss, or "
        "register it as another inner loss. Other causes: a gradient edited by hand or by a "
        "hook, element-wise clipping without gradient_transform(tb.clip_grad_value(...)), a "
        "random operation with a generator of its own, backward(inputs=...) with some of the "
        "parameters only, gradients left over from before (no zero_grad()), or a batch or value "
        "that the loss reads from outside its arguments and that changed since (pass it as an "
        "argument)."
    )


def _refuse_averages(seen: str) -> None:
    """Explain a gradient that does not match where several processes may have averaged it."""
    running = dist.is_available() and dist.is_initialized()
    if running and dist.get_world_size() > 1:
        raise ReplayMismatch(
            f"{seen} A process group of {dist.get_world_size()} is running. If gradients are "
            "averaged over its processes (DistributedDataParallel, FSDP), the step is not that of "
            "the losses of this process, and products with the Hessian would need the same "
            "average, which this library does not take. Train the inner problem in one process."
        )


def compiled_with_dropout(problem: BilevelProblem) -> bool:
    """Whether a guarded module is compiled and dropout is active."""
    if "torch._dynamo" not in sys.modules:
        return False
    members = problem.modules.members.values()
    compiled = any(
        type(m).__name__ == "OptimizedModule"
        or getattr(m, "_compiled_call_impl", None) is not None
        for m in members
    )
    active = any(
        m.training and (isinstance(m, nn.modules.dropout._DropoutNd) or _rate(m))
        for m in members
    )
    return compiled and active


def _rate(module: nn.Module) -> bool:
    rate = getattr(module, "dropout", 0)  # nn.MultiheadAttention, nn.LSTM
    return isinstance(rate, float) and rate > 0


def refuse_unexplained(steps: Sequence[StepRecord], first: bool = False) -> None:
    """Refuse steps that are not one application of an update rule to what the last one left.

    Args:
        steps: recorded steps, oldest first.
        first: whether the state before the first of them matters, too.

    Raises:
        OpaqueStep: a step evaluated its closure several times.
        ReplayMismatch: the state of an optimizer was written to between two of them.
    """
    for number, record in enumerate(steps):
        if record.opaque:
            raise OpaqueStep(
                f"Inner step {record.index} evaluated its closure several times, so it is not "
                "one application of an update rule and cannot be run again. Use an implicit "
                "estimator such as 'cg', which uses the last evaluation."
            )
        if record.rewritten and (number or first):
            raise ReplayMismatch(
                f"The state of an inner optimizer was written to before inner step {record.index} "
                "of this window (momentum set to zero, load_state_dict, a step inside paused()), "
                "which no update rule describes. Call optimizer.restart() after it: the "
                "trajectory begins there. Or use an implicit estimator such as 'cg'."
            )
