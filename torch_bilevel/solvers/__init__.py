"""Linear solvers: A v = b for a map A known by its products.

Adding one is a file and an import line here; see ``docs/extending.md``.
"""

from .base import Memory as Memory
from .base import Operator as Operator
from .base import Solution as Solution
from .base import Solver as Solver
from .cg import CG as CG
from .direct import Direct as Direct
from .identity import Identity as Identity
from .minres import MINRES as MINRES
from .neumann import Neumann as Neumann
from .richardson import Richardson as Richardson

REGISTRY: dict[str, type[Solver]] = {
    cls.name: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, Solver) and cls is not Solver
}
"""Name → class, built from the imports above."""
