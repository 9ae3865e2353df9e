"""One hypergradient: differentiate the outer loss, estimate, check, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import (
    BilevelError,
    Diverged,
    NegativeCurvature,
    NegativeCurvatureWarning,
    NoInnerStep,
    NonFinite,
    StepSizeWarning,
    UnregisteredTerm,
    UnusedOuter,
    ZeroHypergradientWarning,
)
from ..estimators import Estimate, Estimator, Situation
from ..inner import refuse_unregistered
from ..problem import (
    BilevelProblem,
    OuterGradients,
    WeightedCall,
    raise_if_no_second_derivative,
)
from ..solvers import Solution
from .report import Report

Warn = Callable[[type[Warning], str], None]


def run(
    situation: Situation,
    estimator: Estimator,
    calls: Sequence[WeightedCall],
    values: Sequence[Tensor] | None,
    *,
    unused: str,
    strict: bool,
    warn: Warn,
) -> tuple[list[Tensor], Report, Estimate]:
    """The hypergradient of Σ w f, with one host synchronisation at the end.

    Args:
        situation: what the estimator may look at.
        estimator: the estimator.
        calls: calls of outer losses with weights.
        values: their losses, if already evaluated.
        unused: ``"error"`` or ``"zero"``.
        strict: negative curvature raises.
        warn: called with a class and a text.

    Returns:
        One gradient per outer variable, the report and the estimate.
    """
    problem = situation.problem
    began, products = time.perf_counter(), problem.num_products
    try:
        with estimator.differentiating(problem, situation.window):
            outer = (
                problem.outer_gradients(calls, values)
                if calls
                else problem.no_outer_loss()
            )
            situation.outer_calls = calls
            estimate = estimator.estimate(situation, outer)
        estimate.solver = situation.memory.solver
    except RuntimeError as error:
        raise_if_no_second_derivative(error)
        raise
    if unused == "error":
        check_reached(problem, estimate.reached)
    gradients = problem.outer.layout.split(estimate.gradient)
    status, fractions = check_numbers(
        problem, outer, estimate, gradients, estimator, strict, warn
    )
    found = estimate.solution
    report = Report(
        loss=outer.value,
        norm=torch.linalg.vector_norm(estimate.gradient),
        estimator=str(estimator),
        steps=estimate.steps,
        hessian_steps=estimate.hessian_steps,
        products=problem.num_products - products,
        seconds=time.perf_counter() - began,
        zeros=fractions,
        bound=estimate.bound,
        residual=found.residual if found else None,
        solver_steps=found.num_steps if found else None,
        status=status,
        notes=list(estimate.notes),
    )
    return gradients, report, estimate


def check_window(
    situation: Situation, estimator: Estimator, outer_steps: int, leftover: bool
) -> None:
    """Refuse when there is nothing to differentiate, or less than the estimator is about.

    Args:
        situation: has the window.
        estimator: what is to differentiate.
        outer_steps: how many outer steps were taken.
        leftover: gradients of the first step were still there when the second began.

    Raises:
        BilevelError: inside ``torch.inference_mode()``.
        NoInnerStep: no step was recorded, or those kept are too few.
        UnregisteredTerm: a step consumed a gradient that no registered loss explains.
    """
    if torch.is_inference_mode_enabled():
        raise BilevelError(
            "hypergradient() was called inside torch.inference_mode(), where nothing can be "
            "differentiated. Call it outside."
        )
    steps = situation.window.steps()
    if not steps:
        raise NoInnerStep(
            "No inner step has been recorded since the last outer step, so there is nothing to "
            "differentiate. Call the function registered with @optimizer.inner_loss, "
            "back-propagate what it returns and step the inner optimizer first (steps inside "
            "optimizer.paused() do not count)."
            + (
                f" Outer step {outer_steps} used the steps before it; the next needs new ones."
                if outer_steps
                else ""
            )
        )
    count = situation.window.count
    if len(steps) < count:  # not all were kept
        last = estimator.last(situation.sampler.fresh)
        wanted = count if last is None else min(last, count)
        if len(steps) < wanted:
            raise NoInnerStep(
                f"{estimator} is about {wanted} of the {count} inner steps since the last outer "
                f"step, and only {len(steps)} of them kept, for an estimator that needs no "
                "more. Set optimizer.estimator to one that keeps them before the steps, or ask "
                "for fewer (cross_calls= of an implicit estimator, window= of 'unrolled')."
            )
    if leftover:
        raise UnregisteredTerm(
            "The gradients of the first inner step were still in .grad when the loss of the "
            "second was back-propagated, so the second step consumed both. Call "
            "optimizer.zero_grad() before every backward that begins a new step. (Several inner "
            "optimizers step on the gradients of one objective, one after the other: steps that "
            "alternate with backward passes are another algorithm, which is not known here.)"
        )
    for step in steps:
        refuse_unregistered(step)


def check_reached(problem: BilevelProblem, reached: Sequence[bool]) -> None:
    """Refuse outer variables that nothing depends on.

    Raises:
        UnusedOuter: with their names.
    """
    names = problem.outer.layout.names
    lost = [name for name, there in zip(names, reached, strict=True) if not there]
    if lost:
        constant = ", ".join(
            name
            for name, tensor in zip(names, problem.outer.tensors, strict=True)
            if name in lost and not tensor.requires_grad
        )
        why = f" ({constant}: requires_grad is False.)" if constant else ""
        raise UnusedOuter(
            f"The outer variables {', '.join(lost)} reach neither the recorded inner losses "
            "nor the outer loss, so their hypergradient is zero. Use them inside a registered "
            "loss (a value computed from them beforehand, or .item(), .data or .detach(), "
            "cuts them off), or pass unused='zero' if that is meant. ('first_order' drops what "
            f"enters through the inner loss alone.){why}"
        )


def check_numbers(
    problem: BilevelProblem,
    outer: OuterGradients,
    estimate: Estimate,
    gradients: Sequence[Tensor],
    estimator: Estimator,
    strict: bool,
    warn: Warn,
) -> tuple[str, dict[str, Tensor]]:
    """Read every flag at once and raise or warn.

    Returns:
        How the linear solve ended, and per outer tensor the fraction of exact zeros.

    Raises:
        NonFinite: the outer loss or the hypergradient is not finite.
        Diverged: the linear solver diverged.
        NegativeCurvature: it met negative curvature and ``strict`` is set.
    """
    found = estimate.solution
    no = torch.zeros((), dtype=torch.bool, device=outer.value.device)
    zeros = [
        1 - g.count_nonzero() / g.numel() if g.numel() else g.sum() for g in gradients
    ]
    flags = [
        torch.isfinite(outer.value),
        torch.isfinite(estimate.gradient).all(),
        found.diverged if found else no,
        found.negative_curvature if found else no,
        found.converged if found else no,
        *zeros,
    ]
    finite, good, diverged, negative, converged, *fractions = torch.stack(
        [flag.to(outer.value.device, torch.float64) for flag in flags]
    ).tolist()
    if not finite:
        raise NonFinite(
            f"The outer loss is {float(outer.value)}. The inner parameters have probably "
            "diverged; look at the training loss, and lower the inner learning rate."
        )
    if found and diverged:
        raise Diverged(_diverged(estimator, found))
    if not good:
        raise NonFinite(
            "The hypergradient is not finite although the outer loss is. A Hessian-vector "
            "product produced inf or NaN (0/0 or √0 in a second derivative, or an overflow in "
            "16-bit). torch.autograd.detect_anomaly() around optimizer.outer_step(...) names "
            "the operation."
        )
    if found and found.risky_step and found.safe_step is not None:
        option = _option(estimator)
        estimated = (
            "" if option == "adjoint_lr" else "; leave it out to have it estimated"
        )
        warn(
            StepSizeWarning,
            f"The step size of {estimator} is larger than the method allows with samples: "
            f"η < 1/λ_max of the inner Hessian, about {_inverse(found.safe_step)}. "
            f"{option}={float(found.safe_step):.3g} would be safe{estimated}.",
        )
    if found and negative:
        text = _negative(estimator, found)
        if strict:
            raise NegativeCurvature(text)
        warn(NegativeCurvatureWarning, text)
    names = problem.outer.layout.names
    zero = dict(zip(names, zeros, strict=True))
    mostly = [
        f"{name} ({fraction:.0%})"
        for name, fraction, g, direct in zip(
            names, fractions, gradients, problem.direct, strict=True
        )
        # a unit that is dead gives an initialisation zeros, and that is no mistake
        if fraction > 0.5 and g.numel() > 1 and direct is not None
    ]
    if mostly and not estimator.partial:
        warn(
            ZeroHypergradientWarning,
            f"More than half of the entries of {', '.join(mostly)} received exactly zero from "
            f"{estimate.steps} inner steps. If each entry belongs to a training example, take "
            "the outer step after more inner steps, so that the window covers the data.",
        )
    if not found:
        return "", zero
    status = (
        "negative curvature" if negative else "converged" if converged else "max steps"
    )
    return status, zero


def _option(estimator: Estimator) -> str:
    """What the step size of v is called."""
    inside = getattr(estimator, "base", estimator)
    if hasattr(inside, "adjoint_lr"):
        return "adjoint_lr"
    return "lr" if hasattr(getattr(inside, "solver", None), "lr") else "step_size"


def _diverged(estimator: Estimator, found: Solution) -> str:
    option = _option(estimator)
    if option == "adjoint_lr":
        return (
            f"The adjoint of {estimator} is not finite: its steps, of the inner learning rate or "
            "adjoint_lr=, are too large for the inner Hessian. Lower adjoint_lr."
        )
    solver = getattr(getattr(estimator, "base", estimator), "solver", None)
    if getattr(solver, "options", None) or getattr(solver, "optimizer", "SGD") != "SGD":
        return (
            f"The linear solver of {estimator} diverged: the residual grew beyond the right-hand "
            "side. Lower its lr, or use 'cg', which needs none."
        )
    safe = ""
    if found.safe_step is not None and hasattr(solver, "upper"):
        safe = f"upper={1 / float(found.safe_step):.3g}"
    elif found.safe_step is not None:
        safe = f"{option}={float(found.safe_step):.3g}"
    return (
        f"The linear solver of {estimator} diverged: the residual grew beyond the right-hand "
        f"side. λ_max of the inner Hessian is about {_inverse(found.safe_step)}; "
        f"{safe or 'a smaller step_size'} would converge. Leave it out to have it "
        "estimated, or use 'cg', which needs none."
    )


def _inverse(step: Tensor | None) -> str:
    return "unknown" if step is None else f"{1 / float(step):.3g}"


def _negative(estimator: Estimator, found: Solution) -> str:
    return (
        f"{estimator} met negative curvature {float(found.curvature):.3g} in the inner Hessian "
        f"after {int(found.num_steps)} steps and stopped at its last good iterate (at a multiple "
        "of ∂_y f if there was none): the inner "
        "problem is not at a minimum (deep networks often are not). Train the inner problem "
        "longer, add weight decay or damping=, use 'minres', which solves indefinite systems, "
        "or 'unrolled', which needs no stationarity. (Said once; reports keep saying it.)"
    )
