"""The pure face: the library's estimators as functions of pytrees, for ``torch.func``.

- `hypergradient`: ∇Φ of two losses at a point
- `implicit_root`, `implicit_fixed_point`: what any solver returns, differentiable
- `unroll`, `rule`: T steps of an optimizer as a function
- `task_gradient`: the mean hypergradient of a batch of tasks
"""

from .hypergradients import Report as Report
from .hypergradients import hypergradient as hypergradient
from .root import implicit_fixed_point as implicit_fixed_point
from .root import implicit_root as implicit_root
from .rules import rule as rule
from .tasks import TaskReport as TaskReport
from .tasks import task_gradient as task_gradient
from .unrolling import unroll as unroll

__all__ = [
    "Report",
    "TaskReport",
    "hypergradient",
    "implicit_fixed_point",
    "implicit_root",
    "rule",
    "task_gradient",
    "unroll",
]
