"""The inner loop: update rules, recorded steps, replay.

Adding a rule is a file and an import line here; see ``docs/extending.md``.
"""

from torch.optim import Optimizer

from .adadelta import ADADELTA as ADADELTA
from .adafactor import ADAFACTOR as ADAFACTOR
from .adagrad import ADAGRAD as ADAGRAD
from .adagrad import fresh_state as fresh_state
from .adam import ADAM as ADAM
from .adamax import ADAMAX as ADAMAX
from .adamw import ADAMW as ADAMW
from .asgd import ASGD as ASGD
from .fixed_point import FIXED_POINT as FIXED_POINT
from .fixed_point import FixedPointIteration as FixedPointIteration
from .hyperparameters import HyperAdjoint as HyperAdjoint
from .hyperparameters import Hyperparameters as Hyperparameters
from .loop import Loop as Loop
from .loop import Proximal as Proximal
from .loop import Rates as Rates
from .muon import MUON as MUON
from .nadam import NADAM as NADAM
from .radam import RADAM as RADAM
from .replay import check_mismatch as check_mismatch
from .replay import reverse as reverse
from .rerun import Rerun as Rerun
from .rmsprop import RMSPROP as RMSPROP
from .rprop import RPROP as RPROP
from .rule import Stationarity as Stationarity
from .rule import StationarityOf as StationarityOf
from .rule import Step as Step
from .rule import UpdateRule as UpdateRule
from .rule import find_rule as find_rule
from .rule import missing_rule as missing_rule
from .rule import stationarity as stationarity
from .sgd import SGD as SGD
from .tangent import Tangents as Tangents
from .trajectory import Part as Part
from .trajectory import StepRecord as StepRecord
from .trajectory import Window as Window
from .transforms import GradientTransform as GradientTransform
from .transforms import clip_grad_norm as clip_grad_norm
from .transforms import clip_grad_value as clip_grad_value
from .verification import refuse_unregistered as refuse_unregistered
from .verification import tolerance as tolerance
from .verification import verify as verify

RULES: dict[type, UpdateRule] = {
    rule.optimizer: rule
    for rule in list(globals().values())
    if isinstance(rule, UpdateRule)
}
"""Optimizer class → rule, built from the imports above; `register_update_rule` adds to it."""


def register_update_rule(
    optimizer: type[Optimizer],
    step: Step,
    stationarity: StationarityOf | None = None,
    elementwise: bool = True,
) -> UpdateRule:
    """Teach the library the update of an optimizer class, so that it can be unrolled.

    It applies to the class and to subclasses that inherit its ``step``; registering again
    replaces the rule.

    Args:
        optimizer: the class.
        step: ``(parameter, gradient, state, hyper) -> (parameter, state)``: the update of one
            parameter as a pure, differentiable function. ``state`` has the keys of
            ``optimizer.state[parameter]`` and is empty before the first step; ``hyper`` is the
            parameter group. It must give the optimizer's own numbers: every replayed step is
            compared with the recorded one.
        stationarity: ``(parameter, gradient, state, hyper) -> Stationarity``: how weight decay
            enters the fixed point, for implicit estimators; ``inner.rule.l2_stationarity`` where
            it is added to the gradient. Without it, weight decay is refused there.
        elementwise: every entry moves by itself, so that large parameters may be taken in
            pieces; False for updates that mix entries (norms, matrix functions).

    Returns:
        The rule.

    Raises:
        TypeError: ``optimizer`` is not an optimizer class, or ``step`` is not callable.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> class SignSGD(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         for group in self.param_groups:
        ...             for p in group["params"]:
        ...                 p.data.add_(p.grad.sign(), alpha=-group["lr"])
        >>> def sign_sgd(parameter, gradient, state, hyper):
        ...     return parameter - hyper["lr"] * gradient.sign(), state
        >>> rule = tb.register_update_rule(SignSGD, sign_sgd)
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(
            f"register_update_rule({optimizer!r}, ...): the first argument is a class derived from "
            "torch.optim.Optimizer, not an instance."
        )
    if not callable(step):
        raise TypeError(
            f"register_update_rule({optimizer.__name__}, {step!r}): the second argument is the "
            "function step(parameter, gradient, state, hyper) -> (parameter, state)."
        )
    RULES[optimizer] = UpdateRule(optimizer, step, stationarity, elementwise)
    return RULES[optimizer]
