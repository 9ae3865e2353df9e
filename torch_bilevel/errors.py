"""Every error and warning of the library, one class per cause.

A message says what happened, what was seen and what to do. ``docs/troubleshooting.md`` has one
entry per class. All errors derive from `BilevelError`, so one ``except`` catches them.
"""

__all__ = [
    "ArgumentCarriesGraph",
    "BatchChanged",
    "BilevelError",
    "BilevelWarning",
    "CaptureFailed",
    "Disconnected",
    "Diverged",
    "ForwardOverForward",
    "InvalidHyperparameters",
    "InvalidLoss",
    "LossNotRegistered",
    "NeedsLoop",
    "NegativeCurvature",
    "NegativeCurvatureWarning",
    "NoInnerStep",
    "NoOuterStepWarning",
    "NoSecondDerivative",
    "NoThirdDerivative",
    "NoUpdateRule",
    "NonFinite",
    "NonSymmetricSystem",
    "OpaqueStep",
    "OuterDataExhausted",
    "OuterOutsideLoss",
    "RecordingWarning",
    "ReplayMismatch",
    "SolverLimit",
    "StalePoint",
    "TrajectoryTooLong",
    "UnknownName",
    "StepSizeWarning",
    "UnnamedClosure",
    "UnregisteredTerm",
    "UnsolvedWarning",
    "UnsupportedParameter",
    "UnsupportedTransform",
    "UnusedOuter",
    "ZeroHypergradientWarning",
]


class BilevelError(RuntimeError):
    """Base class of every error the library raises."""


class BilevelWarning(UserWarning):
    """Base class of every warning the library issues."""


class LossNotRegistered(BilevelError):
    """An inner or outer loss is needed and none was registered."""


class InvalidLoss(BilevelError):
    """A registered loss returned something that is not one real number."""


class Disconnected(BilevelError):
    """A loss does not depend on the parameters it should depend on."""


class NoInnerStep(BilevelError):
    """A hypergradient was asked for before any inner step was recorded."""


class BatchChanged(BilevelError):
    """An argument was changed in place after, or while, the loss was evaluated on it."""


class ArgumentCarriesGraph(BilevelError):
    """An argument of a registered loss was computed, with a graph, outside the loss."""


class OuterOutsideLoss(BilevelError):
    """An outer variable entered the inner objective outside the registered loss."""


class ReplayMismatch(BilevelError):
    """Evaluating a recorded step again does not reproduce what the step did."""


class UnregisteredTerm(ReplayMismatch):
    """The gradient a step consumed contains a term that no registered loss explains."""


class StalePoint(BilevelError):
    """A linearisation or an outer loss was used after the parameters had moved."""


class NegativeCurvature(BilevelError):
    """The inner Hessian is not positive definite along a direction the solver met."""


class NegativeCurvatureWarning(BilevelWarning):
    """As `NegativeCurvature`, when the solver stopped at its last good iterate."""


class NoOuterStepWarning(BilevelWarning):
    """Inner steps were recorded and no outer step made use of them."""


class ZeroHypergradientWarning(BilevelWarning):
    """More than half of the entries of an outer tensor received exactly zero."""


class StepSizeWarning(BilevelWarning):
    """A step size is larger than a method's theory allows."""


class Diverged(BilevelError):
    """A linear solver moved away from the solution."""


class NonFinite(BilevelError):
    """A loss, a product or a hypergradient is not finite."""


class NoSecondDerivative(BilevelError):
    """An operation of the model has no second derivative in PyTorch."""


class CaptureFailed(BilevelError):
    """A loss could not be recorded as a program of plain operations."""


class KernelUnavailable(BilevelError):
    """A kernel that was asked for cannot run here."""


class NoThirdDerivative(BilevelError):
    """An operation with two derivatives was differentiated three times."""


class ForwardOverForward(BilevelError):
    """Forward mode was nested in forward mode, where PyTorch drops a term without a word."""


class SolverLimit(BilevelError):
    """A solver would need more memory than its limit allows."""


class UnsupportedParameter(BilevelError):
    """A parameter is of a kind the library cannot differentiate."""


class UnusedOuter(BilevelError):
    """An outer variable reaches neither the inner nor the outer loss."""


class OuterDataExhausted(BilevelError):
    """The iterator given as outer data has ended."""


class NoUpdateRule(BilevelError):
    """The update rule of an inner optimizer is not known."""


class NonSymmetricSystem(BilevelError):
    """A solver for symmetric systems was given one that is not."""


class OpaqueStep(BilevelError):
    """A step evaluated its closure several times and cannot be unrolled."""


class InvalidHyperparameters(BilevelError):
    """The function registered with ``inner_hyperparameters`` returned what cannot be set."""


class TrajectoryTooLong(BilevelError):
    """The recorded steps need more memory than ``max_record_bytes``."""


class UnknownName(BilevelError, ValueError):
    """An estimator, solver or option of that name does not exist."""


class RecordingWarning(BilevelWarning):
    """Programs of a loss are recorded again and again."""


class UnsolvedWarning(BilevelWarning):
    """The linear system of an implicit derivative was not solved to its tolerance."""


class UnnamedClosure(BilevelError):
    """A pure function reaches a tensor that is differentiated and was not named."""


class NeedsLoop(BilevelError):
    """An estimator needs a recorded loop, or new samples, that a pure function has not."""


class UnsupportedTransform(BilevelError):
    """Function transforms or compilation cannot be combined in this way."""
