"""In words: what an optimizer will do."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from ..errors import NoUpdateRule
from ..inner import RULES, find_rule, stationarity
from ..kernels.language import unavailable
from ..ops import choices
from ..products import DoubleBackward, Recording

if TYPE_CHECKING:
    from .bilevel import BilevelOptimizer

ATTENTION = (
    torch.nn.MultiheadAttention,
    torch.nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer,
)


def explain(optimizer: BilevelOptimizer) -> str:
    """Who moves what, which batches are used, which engine computes products."""
    problem = optimizer.problem
    estimator = optimizer.estimator
    words = estimator.wording(fresh=optimizer._sampler.fresh)
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
        f"  products: {words.products or _engine(optimizer, words.problem)}, vectors in "
        f"{str(inner.dtype).removeprefix('torch.')} on {inner.device}",
        *_kernels(torch.empty(0, device=inner.device)),
        *_cost(optimizer),
        *_replaced(optimizer),
        *([] if words.products or words.problem else _faster(optimizer)),
        f"  recorded now: {len(optimizer._recorder.window)} inner steps, "
        f"{optimizer._recorder.window.nbytes() / 2**20:.1f} MiB",
    ]
    return "\n".join(lines)


def _engine(optimizer: BilevelOptimizer, problem: str | None) -> str:
    engine = optimizer.products
    if (
        problem is not None
    ):  # steps are differentiated one by one, on a graph of their own
        unused = "" if engine == DoubleBackward() else f"; {str(engine)!r} is not used"
        return f"double backward of each step{unused}"
    why = ", the default" if engine == DoubleBackward() else ", as you asked"
    return f"{str(engine)!r}{why}: {engine.words}"


def _kernels(vector: torch.Tensor) -> list[str]:
    """What runs as a kernel of this package, on devices that have any, or why nothing does."""
    if vector.device.type == "cpu":
        return []
    why = unavailable(vector)
    if why is not None:
        return [f"  kernels: none, because {why}"]
    parts = [
        "steps of cg, richardson, neumann, heavy_ball and nesterov",
        *choices.values(),
    ]
    return [f"  kernels: {'; '.join(parts)}"]


def _cost(optimizer: BilevelOptimizer) -> list[str]:
    """What the last outer step took, and what is known of a product."""
    lines = []
    report = optimizer.last_report
    if report is not None:
        lines.append(
            f"  cost: {report.products} products in {report.seconds:.3g} s in the last "
            "hypergradient"
        )
    programs = [
        r for r in optimizer.problem.recorded.values() if isinstance(r, Recording)
    ]
    for program in programs:
        operations, nbytes = program.size()
        lines.append(
            f"  recorded program of {program.name!r}: {operations} operations a product, "
            f"{nbytes / 2**20:.1f} MiB kept of a point"
        )
    return lines


def _replaced(optimizer: BilevelOptimizer) -> list[str]:
    """What is evaluated by other kernels than the loop's own."""
    modules = optimizer.problem.modules
    found = []
    if any(isinstance(m, ATTENTION) for m in modules.members.values()):
        found.append("fused attention by its mathematical form")
    if "torch._dynamo" in sys.modules:
        found.append("compiled functions, if there are any, by eager ones")
    if modules.recurrent:
        found.append("cuDNN's recurrent kernels by PyTorch's own")
    if modules.weight_norm:
        found.append("the fused weight normalisation by its definition")
    return [f"  replaced while differentiating: {', '.join(found)}"] if found else []


def _faster(optimizer: BilevelOptimizer) -> list[str]:
    """What would take less time, where that can be told."""
    inner = optimizer.problem.inner
    known: set[str] = set()
    for loss in optimizer.inner_losses.values():
        code = getattr(loss.function, "__code__", None)
        known |= set(getattr(code, "co_names", ()))
    advice = []
    shapes = sorted(len(shape) for shape in inner.layout.shapes)
    linear = shapes in ([2], [1, 2])
    if linear and not any(name.startswith("linear_") for name in known):
        advice.append(
            "one linear layer: torch_bilevel.ops.linear_cross_entropy (linear_logistic, "
            "linear_squared_error) in the inner loss"
        )
    elif not linear and optimizer.products == DoubleBackward():
        advice.append(
            "several hundred products or more: products='traced(compile=True)'"
        )
    if inner.layout.numel <= 1000 and "direct" not in str(optimizer.estimator):
        advice.append("few parameters: estimator='direct' solves exactly")
    return [f"  may be faster: {'; '.join(advice)}"] if advice else []


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
