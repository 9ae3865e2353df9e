"""Estimators of the hypergradient, and their names.

Adding one is a file and an import line here; see ``docs/extending.md``. The name of a solver
stands for `Implicit` with that solver.
"""

import dataclasses
from typing import Any

from .. import _registry
from ..solvers import REGISTRY as SOLVERS
from ..solvers import Solver
from .base import Estimate as Estimate
from .base import Estimator as Estimator
from .base import EstimatorMemory as EstimatorMemory
from .base import Situation as Situation
from .displacement import Displacement as Displacement
from .first_order import FirstOrder as FirstOrder
from .forward import Forward as Forward
from .forward_gradient import ForwardGradient as ForwardGradient
from .implicit import Implicit as Implicit
from .unrolled import PRESETS as PRESETS
from .unrolled import Unrolled as Unrolled

REGISTRY: dict[str, type[Estimator]] = {
    cls.name: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, Estimator) and cls is not Estimator
}
"""Name → class, built from the imports above."""


def parse(spec: Any) -> Estimator:
    """The estimator that a name, a name with options, or an object stands for.

    Args:
        spec: ``"cg"``, ``"cg(max_steps=20, damping=1e-2)"``, ``"unrolled(window=50)"``, an
            `Estimator`, or a linear solver (which stands for `Implicit` with it).

    Returns:
        The estimator; ``str(estimator)`` gives the string back.

    Raises:
        UnknownName: no estimator, solver or option has that name.

    Example:
        >>> import torch_bilevel as tb
        >>> tb.estimator("cg(max_steps=7, hessian_calls=2)")
        Implicit(solver=CG(max_steps=7, rtol=0.0001), hessian_calls=2, cross_calls=None, \
damping=0.0, warm_start=True)
    """
    if isinstance(spec, Estimator):
        return spec
    if isinstance(spec, Solver):
        return Implicit(spec)
    if not isinstance(spec, str):
        raise _registry.UnknownName(
            f"estimator={spec!r}: write a name such as 'cg', or an object such as "
            "tb.Implicit(tb.CG())."
        )
    name, options = _registry.parse(spec, names(), "estimator")
    if name in PRESETS:
        return _registry.build(Unrolled, {**PRESETS[name], **options}, name)
    if name in REGISTRY and name != Implicit.name:
        return _registry.build(REGISTRY[name], options, name)
    outside = {f.name for f in dataclasses.fields(Implicit)} - {"solver"}
    own = {key: value for key, value in options.items() if key in outside}
    rest = {key: value for key, value in options.items() if key not in outside}
    cls = SOLVERS[name]
    known = {f.name for f in dataclasses.fields(cls)} | outside  # type: ignore[arg-type]
    for option in rest:
        if option not in known:
            raise _registry.UnknownName(
                f"{name!r} has no option {option!r}. {_registry.suggest(option, known)}"
            )
    return Implicit(cls(**rest), **own)


def names() -> dict[str, str]:
    """Every name ``estimator=`` accepts, with one line each."""
    implicit = {
        name: f"implicit differentiation; {_line(cls)}" for name, cls in SOLVERS.items()
    }
    others = {n: _line(c) for n, c in REGISTRY.items() if n != Implicit.name}
    presets = {
        name: f"stands for {_registry.describe(Unrolled.name, options)}"
        for name, options in PRESETS.items()
    }
    return {**implicit, **others, **presets}


def _line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]
