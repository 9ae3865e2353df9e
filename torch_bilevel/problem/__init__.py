"""The bilevel problem: live parameters, recorded calls, gradients and linearisations."""

from .calls import Call as Call
from .calls import WeightedCall as WeightedCall
from .calls import autocast as autocast
from .calls import record as record
from .calls import scalar as scalar
from .calls import with_loss as with_loss
from .kept import keep as keep
from .linearization import Linearization as Linearization
from .modules import ModuleSet as ModuleSet
from .problem import BilevelProblem as BilevelProblem
from .problem import OuterGradients as OuterGradients
from .problem import evaluations as evaluations
from .problem import raise_if_no_second_derivative as raise_if_no_second_derivative
from .randomness import Randomness as Randomness
from .randomness import preserved as preserved
from .variables import Variables as Variables
from .variables import gradients as gradients
