"""Estimators of the hypergradient, and their names.

Adding one is a file and an import line here; see ``docs/extending.md``. The name of a solver
stands for `Implicit` with that solver, or for `Stochastic` where the solver is made for samples.
"""

import dataclasses
from typing import Any

from .. import _registry
from ..solvers import REGISTRY as SOLVERS
from ..solvers import Solver
from .accelerated import Accelerated as Accelerated
from .base import Estimate as Estimate
from .base import Estimator as Estimator
from .base import EstimatorMemory as EstimatorMemory
from .base import Situation as Situation
from .certificate import Smoothness as Smoothness
from .displacement import Displacement as Displacement
from .finite_difference import FiniteDifference as FiniteDifference
from .first_order import FirstOrder as FirstOrder
from .forward import Forward as Forward
from .forward_gradient import ForwardGradient as ForwardGradient
from .implicit import Implicit as Implicit
from .joint import Joint as Joint
from .memory import MovingAverage as MovingAverage
from .memory import Page as Page
from .memory import Plain as Plain
from .memory import Saga as Saga
from .memory import Sarah as Sarah
from .memory import Storm as Storm
from .presets import PRESETS as PRESETS
from .response_jacobian import ResponseJacobian as ResponseJacobian
from .stochastic import Stochastic as Stochastic
from .unrolled import Unrolled as Unrolled

REGISTRY: dict[str, type[Estimator]] = {
    cls.name: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, Estimator) and cls is not Estimator
}
"""Name → class, built from the imports above."""

AROUND_SOLVERS = (Implicit.name, Stochastic.name)
"""Estimators that go by the name of their solver."""


def parse(spec: Any) -> Estimator:
    """The estimator that a name, a name with options, or an object stands for.

    Args:
        spec: ``"cg"``, ``"cg(max_steps=20, damping=1e-2)"``, ``"unrolled(window=50)"``, an
            `Estimator`, or a linear solver (which stands for `Implicit` or `Stochastic` with it).

    Returns:
        The estimator; ``str(estimator)`` gives the string back.

    Raises:
        UnknownName: no estimator, solver or option has that name.

    Example:
        >>> import torch_bilevel as tb
        >>> tb.estimator("cg(max_steps=7, hessian_calls=2)")
        Implicit(solver=CG(max_steps=7, rtol=0.0001), hessian_calls=2, cross_calls=None, \
damping=0.0, warm_start=True, certify=False)
    """
    if isinstance(spec, Estimator):
        return spec
    if isinstance(spec, Solver):
        return _around(type(spec))(spec)
    if not isinstance(spec, str):
        raise _registry.UnknownName(
            f"estimator={spec!r}: write a name such as 'cg', or an object such as "
            "tb.Implicit(tb.CG())."
        )
    name, options = _registry.parse(spec, names(), "estimator")
    if name in PRESETS:
        name, chosen = _registry.parse(PRESETS[name], names(), "estimator")
        options = {**chosen, **options}
    if name in REGISTRY and name not in AROUND_SOLVERS:
        return _registry.build(REGISTRY[name], options, name)
    around = _around(SOLVERS[name])
    outside = {f.name for f in dataclasses.fields(around)} - {"solver"}
    own = {key: value for key, value in options.items() if key in outside}
    rest = {key: value for key, value in options.items() if key not in outside}
    cls = SOLVERS[name]
    known = {f.name for f in dataclasses.fields(cls)} | outside  # type: ignore[arg-type]
    for option in rest:
        if option not in known:
            raise _registry.UnknownName(
                f"{name!r} has no option {option!r}. {_registry.suggest(option, known)}"
            )
    return around(cls(**rest), **own)


def _around(cls: type[Solver]) -> Any:
    """The estimator that a solver's name stands for."""
    return Stochastic if cls.stochastic else Implicit


def names() -> dict[str, str]:
    """Every name ``estimator=`` accepts, with one line each."""
    kinds = {Implicit: "implicit differentiation", Stochastic: "on new samples"}
    solving = {
        name: f"{kinds[_around(cls)]}; {_line(cls)}" for name, cls in SOLVERS.items()
    }
    others = {n: _line(c) for n, c in REGISTRY.items() if n not in AROUND_SOLVERS}
    presets = {name: f"stands for {text}" for name, text in PRESETS.items()}
    return {**solving, **others, **presets}


def _line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]
