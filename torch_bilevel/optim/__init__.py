"""The optimizer a user constructs, the named algorithms, and tools around them.

Adding a named algorithm is a file and an import line here; see ``docs/extending.md``.
"""

from .aidbio import AIDBiO as AIDBiO
from .anil import ANIL as ANIL
from .bilevel import BilevelOptimizer as BilevelOptimizer
from .check import HypergradientCheck as HypergradientCheck
from .check import check_hypergradient as check_hypergradient
from .citation import citation as citation
from .fomaml import FOMAML as FOMAML
from .imaml import IMAML as IMAML
from .itdbio import ITDBiO as ITDBiO
from .maml import MAML as MAML
from .metasgd import MetaSGD as MetaSGD
from .report import Report as Report
from .reptile import Reptile as Reptile
