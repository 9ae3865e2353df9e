"""The optimizer a user constructs, the named algorithms, and tools around them.

Adding a named algorithm is a file and an import line here; see ``docs/extending.md``.
"""

from .accbio import AccBiO as AccBiO
from .aidbio import AIDBiO as AIDBiO
from .amigo import AmIGO as AmIGO
from .anil import ANIL as ANIL
from .bilevel import BilevelOptimizer as BilevelOptimizer
from .bsgm import BSGM as BSGM
from .check import HypergradientCheck as HypergradientCheck
from .check import check_hypergradient as check_hypergradient
from .citation import citation as citation
from .constraints import L1 as L1
from .constraints import Ball as Ball
from .constraints import Box as Box
from .constraints import Constraint as Constraint
from .constraints import Group as Group
from .constraints import NonNegative as NonNegative
from .constraints import Simplex as Simplex
from .darts import DARTS as DARTS
from .fomaml import FOMAML as FOMAML
from .imaml import IMAML as IMAML
from .itdbio import ITDBiO as ITDBiO
from .maml import MAML as MAML
from .metasgd import MetaSGD as MetaSGD
from .mrbo import MRBO as MRBO
from .named import MetaAlgorithm as MetaAlgorithm
from .named import NamedAlgorithm as NamedAlgorithm
from .proxbio import ProxBiO as ProxBiO
from .pzobo import PZOBO as PZOBO
from .report import Report as Report
from .reptile import Reptile as Reptile
from .saba import SABA as SABA
from .sid import SID as SID
from .soba import SOBA as SOBA
from .srba import SRBA as SRBA
from .stocbio import StocBiO as StocBiO
from .vrbo import VRBO as VRBO
