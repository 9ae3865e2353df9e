"""The bilevel problem: live parameters, recorded calls, gradients and linearisations."""

from .batches import Batches as Batches
from .calls import Call as Call
from .calls import WeightedCall as WeightedCall
from .calls import autocast as autocast
from .calls import record as record
from .calls import residual as residual
from .calls import scalar as scalar
from .calls import with_loss as with_loss
from .data import DataSource as DataSource
from .kept import keep as keep
from .linearization import Linearization as Linearization
from .modules import ModuleSet as ModuleSet
from .modules import reachable_numbers as reachable_numbers
from .once import raise_if_no_second_derivative as raise_if_no_second_derivative
from .point import Point as Point
from .problem import BilevelProblem as BilevelProblem
from .problem import OuterGradients as OuterGradients
from .problem import evaluations as evaluations
from .problem import like as like
from .randomness import Randomness as Randomness
from .randomness import preserved as preserved
from .sampling import Sample as Sample
from .sampling import Ticket as Ticket
from .sampling import mean_calls as mean_calls
from .variables import Variables as Variables
from .variables import gradients as gradients
