"""The inner loop: update rules, recorded steps, replay.

Adding a rule is a file and an import line here; see ``docs/extending.md``.
"""

from .adam import ADAM as ADAM
from .adamw import ADAMW as ADAMW
from .replay import reverse as reverse
from .rule import Stationarity as Stationarity
from .rule import UpdateRule as UpdateRule
from .rule import find_rule as find_rule
from .rule import missing_rule as missing_rule
from .rule import stationarity as stationarity
from .sgd import SGD as SGD
from .trajectory import Part as Part
from .trajectory import StepRecord as StepRecord
from .trajectory import Window as Window
from .transforms import GradientTransform as GradientTransform
from .transforms import clip_grad_norm as clip_grad_norm
from .transforms import clip_grad_value as clip_grad_value
from .verification import tolerance as tolerance
from .verification import verify as verify

RULES: dict[type, UpdateRule] = {
    rule.optimizer: rule
    for rule in list(globals().values())
    if isinstance(rule, UpdateRule)
}
"""Optimizer class → rule, built from the imports above."""
