"""In words: what an optimizer will do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import NoUpdateRule
from ..inner import RULES, find_rule, stationarity

if TYPE_CHECKING:
    from .bilevel import BilevelOptimizer


def explain(optimizer: BilevelOptimizer) -> str:
    """Who moves what, which batches are used, which engine computes products."""
    problem = optimizer.problem
    estimator = optimizer.estimator
    words = estimator.wording(
        fresh=all(loss.data is not None for loss in optimizer.inner_losses.values())
    )
    inner, outer = problem.inner.layout, problem.outer.layout
    where = " at extrapolated points" if estimator.extrapolates else ""
    names = ", ".join(type(o).__name__ for o in optimizer.inners)
    lines = [
        f"{type(optimizer).__name__} with estimator {str(estimator)!r}",
        f"  y  inner: {inner.numel:,} numbers in {len(inner.names)} tensors, moved by your "
        f"{names}",
        f"  x  outer: {outer.numel:,} numbers in {len(outer.names)} tensors "
        f"({', '.join(outer.names[:3])}{', …' if len(outer.names) > 3 else ''}), moved by your "
        f"{type(optimizer.outer).__name__}{where}",
        f"  constraints: {optimizer._constraints.describe(outer.names)}",
        f"  v  adjoint: {words.adjoint}",
        f"  when: {_when(optimizer)}",
        f"  inner losses: {', '.join(optimizer.inner_losses) or 'none registered'}",
        f"  outer losses: {_outer(optimizer)}",
        f"  inner batches: {words.batches}",
        f"  inner problem: {_system(optimizer, words.problem)}",
        f"  products: {words.products}, vectors in "
        f"{str(inner.dtype).removeprefix('torch.')} on {inner.device}",
        f"  recorded now: {len(optimizer._recorder.window)} inner steps, "
        f"{optimizer._recorder.window.nbytes() / 2**20:.1f} MiB",
    ]
    return "\n".join(lines)


def _when(optimizer: BilevelOptimizer) -> str:
    when = "when you call outer_step() or step the outer optimizer"
    if optimizer.inner_steps:
        when = f"an outer step after every {optimizer.inner_steps} inner steps"
    return when if optimizer.warm_start else f"{when}; y then begins anew"


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


def _system(optimizer: BilevelOptimizer, said: str | None) -> str:
    if said == "replayed":
        rules = [find_rule(o, RULES) for o in optimizer.inners]
        return "replayed with " + ", ".join(r.step.__name__ for r in rules if r)
    if said is not None:
        return said
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
