"""Bilevel optimization for PyTorch, in the training loop you already have.

- *outer variables* x: what the validation loss teaches (data weights, penalties, ...)
- *inner variables* y: what the training loss trains, the parameters of your model
- *hypergradient*: ∇Φ(x) of Φ(x) = f(x, y*(x)), the gradient with respect to x of the validation
  loss after training
- *estimator*: a way to compute it, implicit (``"cg"``, ``"neumann"``, ...) or ``"unrolled"``

>>> import torch, torch_bilevel as tb
>>> tb.estimator("cg(max_steps=10)").solver
CG(max_steps=10, rtol=0.0001)
>>> tb.estimator("unrolled(window=5)")
Unrolled(window=5, checkpoint_every=None, iterate_bytes=None, offload=None, keep_graph=False)
>>> str(tb.estimator("mrbo"))          # a published name is a choice of parts
"stochastic_neumann(memory='storm')"
"""

from . import _first_calls as _first_calls
from . import errors as errors
from . import estimators as _estimators
from . import func as func
from . import ops as ops
from . import solvers as _solvers
from ._version import __version__ as __version__
from .errors import *  # noqa: F403
from .errors import __all__ as _error_names
from .estimators import (
    Accelerated,
    Displacement,
    FiniteDifference,
    FirstOrder,
    Forward,
    ForwardGradient,
    Implicit,
    Joint,
    MovingAverage,
    Page,
    Plain,
    ResponseJacobian,
    Saga,
    Sarah,
    Smoothness,
    Stochastic,
    Storm,
    Unrolled,
)
from .estimators import parse as estimator
from .inner import (
    FixedPointIteration,
    clip_grad_norm,
    clip_grad_value,
    register_update_rule,
)
from .ops import model_output
from .optim import (
    ANIL,
    BSGM,
    DARTS,
    FOMAML,
    IMAML,
    L1,
    MAML,
    MRBO,
    PZOBO,
    SABA,
    SID,
    SOBA,
    SRBA,
    VRBO,
    AccBiO,
    AIDBiO,
    AmIGO,
    Ball,
    BilevelOptimizer,
    Box,
    Constraint,
    Group,
    HypergradientCheck,
    ITDBiO,
    MetaSGD,
    NonNegative,
    ProxBiO,
    Report,
    Reptile,
    Simplex,
    StocBiO,
    check_hypergradient,
    citation,
)
from .problem import Batches
from .products import (
    CentralDifference,
    DoubleBackward,
    ForwardOverReverse,
    GaussNewton,
    Traced,
)
from .products import names as products
from .second_order import second_order
from .solvers import (
    CG,
    CGNR,
    GMRES,
    MINRES,
    Direct,
    HeavyBall,
    Identity,
    Nesterov,
    Neumann,
    RandomTruncatedNeumann,
    Richardson,
    SampleSpace,
    SGDSolver,
    StochasticNeumann,
    StochasticRichardson,
)

__all__ = [
    "AIDBiO",
    "AccBiO",
    "Accelerated",
    "ANIL",
    "AmIGO",
    "BSGM",
    "Ball",
    "Batches",
    "BilevelOptimizer",
    "Box",
    "CG",
    "CGNR",
    "CentralDifference",
    "Constraint",
    "DARTS",
    "Direct",
    "DoubleBackward",
    "Displacement",
    "FOMAML",
    "FiniteDifference",
    "FirstOrder",
    "FixedPointIteration",
    "Forward",
    "ForwardGradient",
    "ForwardOverReverse",
    "GMRES",
    "GaussNewton",
    "Group",
    "HeavyBall",
    "HypergradientCheck",
    "IMAML",
    "ITDBiO",
    "Identity",
    "Implicit",
    "Joint",
    "L1",
    "MAML",
    "MINRES",
    "MRBO",
    "MetaSGD",
    "MovingAverage",
    "Nesterov",
    "Neumann",
    "NonNegative",
    "PZOBO",
    "Page",
    "Plain",
    "ProxBiO",
    "RandomTruncatedNeumann",
    "Report",
    "Reptile",
    "ResponseJacobian",
    "Richardson",
    "SABA",
    "SGDSolver",
    "SID",
    "SOBA",
    "SRBA",
    "Saga",
    "SampleSpace",
    "Sarah",
    "Smoothness",
    "Simplex",
    "StocBiO",
    "Stochastic",
    "StochasticNeumann",
    "StochasticRichardson",
    "Storm",
    "Traced",
    "Unrolled",
    "VRBO",
    "check_hypergradient",
    "citation",
    "clip_grad_norm",
    "clip_grad_value",
    "errors",
    "estimator",
    "estimators",
    "model_output",
    "ops",
    "products",
    "register_update_rule",
    "second_order",
    "solvers",
    *_error_names,
]


def estimators() -> dict[str, str]:
    """Every name ``estimator=`` accepts, with one line each.

    Returns:
        Name → one line.
    """
    return _estimators.names()


def solvers() -> dict[str, str]:
    """Every linear solver, with one line each.

    Returns:
        Name → one line.
    """
    return {
        name: (cls.__doc__ or "").strip().splitlines()[0]
        for name, cls in _solvers.REGISTRY.items()
    }
