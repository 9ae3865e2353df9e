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
>>> sorted(tb.solvers())
['cg', 'direct', 'identity', 'minres', 'neumann', 'richardson']
"""

from . import errors as errors
from . import estimators as _estimators
from . import solvers as _solvers
from ._version import __version__ as __version__
from .errors import *  # noqa: F403
from .errors import __all__ as _error_names
from .estimators import (
    Displacement,
    FirstOrder,
    Forward,
    ForwardGradient,
    Implicit,
    Unrolled,
)
from .estimators import parse as estimator
from .inner import clip_grad_norm, clip_grad_value, register_update_rule
from .optim import (
    ANIL,
    FOMAML,
    IMAML,
    MAML,
    AIDBiO,
    BilevelOptimizer,
    HypergradientCheck,
    ITDBiO,
    MetaSGD,
    Report,
    Reptile,
    check_hypergradient,
    citation,
)
from .second_order import second_order
from .solvers import CG, MINRES, Direct, Identity, Neumann, Richardson

__all__ = [
    "AIDBiO",
    "ANIL",
    "BilevelOptimizer",
    "CG",
    "Direct",
    "Displacement",
    "FOMAML",
    "FirstOrder",
    "Forward",
    "ForwardGradient",
    "HypergradientCheck",
    "ITDBiO",
    "IMAML",
    "Identity",
    "Implicit",
    "MAML",
    "MINRES",
    "MetaSGD",
    "Neumann",
    "Report",
    "Reptile",
    "Richardson",
    "Unrolled",
    "check_hypergradient",
    "citation",
    "clip_grad_norm",
    "clip_grad_value",
    "errors",
    "estimator",
    "estimators",
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
