"""In words: what an optimizer will do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import NoUpdateRule
from ..estimators import Estimator, Implicit, Joint, Stochastic, Unrolled
from ..inner import RULES, find_rule, stationarity

if TYPE_CHECKING:
    from .bilevel import BilevelOptimizer


def explain(optimizer: BilevelOptimizer) -> str:
    """Who moves what, which batches are used, which engine computes products."""
    problem = optimizer.problem
    estimator = optimizer.estimator
    inner, outer = problem.inner.layout, problem.outer.layout
    names = ", ".join(type(o).__name__ for o in optimizer.inners)
    lines = [
        f"{type(optimizer).__name__} with estimator {str(estimator)!r}",
        f"  y  inner: {inner.numel:,} numbers in {len(inner.names)} tensors, moved by your "
        f"{names}",
        f"  x  outer: {outer.numel:,} numbers in {len(outer.names)} tensors "
        f"({', '.join(outer.names[:3])}{', …' if len(outer.names) > 3 else ''}), moved by your "
        f"{type(optimizer.outer).__name__}",
        f"  constraints: {optimizer._constraints.describe(outer.names)}",
        f"  v  adjoint: {_adjoint(optimizer)}",
        f"  when: {_when(optimizer)}",
        f"  inner losses: {', '.join(optimizer.inner_losses) or 'none registered'}",
        f"  outer losses: {_outer(optimizer)}",
        f"  inner batches: {_batches(optimizer)}",
        f"  inner problem: {_system(optimizer)}",
        "  products: double backward through one cached graph, vectors in "
        f"{str(inner.dtype).removeprefix('torch.')} on {inner.device}",
        f"  recorded now: {len(optimizer._recorder.window)} inner steps, "
        f"{optimizer._recorder.window.nbytes() / 2**20:.1f} MiB",
    ]
    return "\n".join(lines)


def _estimator(optimizer: BilevelOptimizer) -> Estimator:
    """The estimator of the hypergradient, without what it is wrapped in."""
    return getattr(optimizer.estimator, "base", optimizer.estimator)


def _adjoint(optimizer: BilevelOptimizer) -> str:
    estimator = _estimator(optimizer)
    if isinstance(estimator, Joint):
        rate = estimator.adjoint_lr or "the inner learning rate"
        return f"state; a step of {rate} along H v − ∂_y f at every inner step"
    if isinstance(estimator, Stochastic):
        start = "the last outer step's" if estimator.warm_start else "zero"
        return f"solved for by {estimator.solver} on new samples, from {start}"
    if not isinstance(estimator, Implicit):
        return "none; the gradient is carried back through the recorded steps"
    warm = estimator.warm_start and estimator.solver.uses_start
    start = "warm-started from the last outer step" if warm else "from zero"
    return f"solved for by {estimator.solver}, {start}"


def _when(optimizer: BilevelOptimizer) -> str:
    if optimizer.inner_steps:
        return f"an outer step after every {optimizer.inner_steps} inner steps"
    return "when you call outer_step() or step the outer optimizer"


def _outer(optimizer: BilevelOptimizer) -> str:
    described = []
    for loss in optimizer.outer_losses.values():
        data = loss.data
        where = (
            "you pass the batch"
            if data is None
            else f"{data.batches} batch(es) from {type(data.source).__name__}"
        )
        described.append(f"{loss.name} (weight {loss.weight:g}, {where})")
    return ", ".join(described) or "none registered"


def _batches(optimizer: BilevelOptimizer) -> str:
    estimator = _estimator(optimizer)
    if isinstance(estimator, Joint):
        return "each inner step's own batch, where the step started"
    if isinstance(estimator, Stochastic):
        lacking = [k for k, loss in optimizer.inner_losses.items() if loss.data is None]
        where = (
            "the steps since the last outer step, drawn again" if lacking else "data="
        )
        count = estimator.cross_batches or "as many as there were inner steps"
        return f"H and J from new samples ({where}); J averaged over {count}"
    if isinstance(estimator, Implicit):
        last = estimator.cross_calls
        cross = (
            f"the last {last} steps" if last else "all steps since the last outer step"
        )
        return f"H from the last {estimator.hessian_calls} step(s), J v averaged over {cross}"
    if isinstance(estimator, Unrolled) and estimator.window:
        return f"the last {estimator.window} steps, in order"
    return "all steps since the last outer step, in order"


def _system(optimizer: BilevelOptimizer) -> str:
    if not isinstance(_estimator(optimizer), (Implicit, Joint, Stochastic)):
        rules = [find_rule(o, RULES) for o in optimizer.inners]
        return "replayed with " + ", ".join(r.step.__name__ for r in rules if r)
    try:
        known = [s for o in optimizer.inners for s in stationarity(o, RULES)]
    except NoUpdateRule as error:
        return str(error)
    decayed = any(not isinstance(s.decay, float) or s.decay for s in known)
    frozen = any(s.frozen for s in known)
    text = (
        "∇_y g = 0" if not decayed else "∇_y g + wd·y = 0 (weight decay is part of H)"
    )
    return text + (" with the preconditioner of the present state" if frozen else "")
