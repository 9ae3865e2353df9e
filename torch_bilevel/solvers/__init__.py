"""Linear solvers: A v = b for a map A known by its products.

Adding one is a file and an import line here; see ``docs/extending.md``.
"""

from .base import Memory as Memory
from .base import Operator as Operator
from .base import Solution as Solution
from .base import Solver as Solver
from .base import relative as relative
from .base import solution as solution
from .cg import CG as CG
from .cgnr import CGNR as CGNR
from .device import capture as capture
from .device import copy_all as copy_all
from .direct import Direct as Direct
from .gmres import GMRES as GMRES
from .heavy_ball import HeavyBall as HeavyBall
from .identity import Identity as Identity
from .loops import constant as constant
from .loops import differentiated as differentiated
from .loops import may_look as may_look
from .loops import transformed as transformed
from .minres import MINRES as MINRES
from .nesterov import Nesterov as Nesterov
from .neumann import Neumann as Neumann
from .random_truncated_neumann import (
    RandomTruncatedNeumann as RandomTruncatedNeumann,
)
from .richardson import Richardson as Richardson
from .sample_space import SampleSpace as SampleSpace
from .sgd import SGDSolver as SGDSolver
from .spectrum import normal as normal
from .stochastic_neumann import StochasticNeumann as StochasticNeumann
from .stochastic_richardson import StochasticRichardson as StochasticRichardson

REGISTRY: dict[str, type[Solver]] = {
    cls.name: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, Solver) and cls is not Solver
}
"""Name → class, built from the imports above."""
