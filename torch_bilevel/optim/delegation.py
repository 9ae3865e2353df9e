"""An optimizer whose groups, state and defaults are those of other optimizers.

Copies would drift apart after ``inner.load_state_dict``; properties cannot. Schedulers, gradient
scalers and training frameworks, which accept nothing but a real `torch.optim.Optimizer`, act on
the inner optimizers through it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from ..errors import BilevelError

_HOOKS = "_optimizer_step_pre_hooks"


def unwrapped(optimizer: Any) -> Any:
    """The optimizer whose hooks run, inside what Accelerate or Lightning prepared.

    Their wrappers are optimizers by type, have no hooks or those of the optimizer they hold, and
    pass ``step()`` on to it. A wrapper with hooks of its own is an optimizer of its own.
    """
    inside = getattr(optimizer, "optimizer", None)
    if not all(isinstance(o, torch.optim.Optimizer) for o in (optimizer, inside)):
        return optimizer
    own = getattr(optimizer, _HOOKS, None)
    if own is not None and own is not getattr(inside, _HOOKS, None):
        return optimizer
    return unwrapped(inside)


class DelegatingOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` without parameters of its own.

    Args:
        inner: the optimizer it stands for, or several.
    """

    def __init__(self, inner: Any):
        self.inner = inner
        # They may decide not to step, while gradients accumulate.
        self._given = list(inner) if isinstance(inner, (list, tuple)) else [inner]
        self.inners: list[torch.optim.Optimizer] = [unwrapped(o) for o in self._given]
        # What ``Optimizer.__init__`` sets up, without parameter groups of our own.
        for kind in ("step_pre", "step_post"):
            setattr(self, f"_optimizer_{kind}_hooks", OrderedDict())
        for kind in ("state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                setattr(self, f"_optimizer_{kind}_{when}_hooks", OrderedDict())
        self._warned_capturable_if_run_uncaptured = True
        # torch would wrap step() in a profiler region and its hooks, 10 µs a step on top of those
        # of the inner optimizers; `step` runs the hooks itself.
        type(self).step.hooked = True  # type: ignore[attr-defined]
        self._patch_step_function()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take the inner step: ``inner.step(closure)``, of every inner optimizer.

        Args:
            closure: as in ``torch.optim``; evaluated by the first inner optimizer.

        Returns:
            What the first inner optimizer returned.
        """
        args: tuple[Any, ...] = (self, closure) if closure else (self,)
        for before in list(self._optimizer_step_pre_hooks.values()):
            changed = before(self, args, {})
            if changed is not None:
                args = changed[0]
                closure = args[1] if len(args) > 1 else changed[1].get("closure")
        first, *others = self._given
        result = first.step(closure) if closure else first.step()
        for optimizer in others:
            optimizer.step()
        for after in list(self._optimizer_step_post_hooks.values()):
            after(self, args, {})
        return result

    def _reset_gradients(self, set_to_none: bool) -> bool:
        """Whether they are reset: what a framework prepared leaves them while they accumulate."""
        every = (p for group in self.param_groups for p in group["params"])
        held = next((p for p in every if p.grad is not None), None)
        gradient = None if held is None else held.grad
        version = None if gradient is None else gradient._version
        for optimizer in self._given:
            optimizer.zero_grad(set_to_none)
        if held is None or gradient is None:
            return True
        return held.grad is not gradient or gradient._version != version

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of ``inner`` themselves, so that schedulers act on them."""
        return [group for optimizer in self.inners for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._only_inner("param_groups").param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of ``inner`` itself (a merged copy when there are several)."""
        if len(self.inners) == 1:
            return self.inners[0].state
        return {p: s for optimizer in self.inners for p, s in optimizer.state.items()}

    @state.setter
    def state(self, value: Any) -> None:
        self._only_inner("state").state = value

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of ``inner`` (of the first, when there are several)."""
        return self.inners[0].defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to ``inner``; recorded steps are dropped, with a warning.

        Args:
            param_group: as in ``torch.optim``.
        """
        self._only_inner("add_param_group()").add_param_group(param_group)

    def _only_inner(self, what: str) -> torch.optim.Optimizer:
        if len(self.inners) > 1:
            raise BilevelError(
                f"{what} is ambiguous with {len(self.inners)} inner optimizers; use the one "
                "you mean: optimizer.inner[i]."
            )
        return self.inners[0]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "A BilevelOptimizer holds hooks and closures and cannot be pickled. Save "
            "optimizer.state_dict() and load it into one constructed anew."
        )

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError(
            "A BilevelOptimizer holds hooks on its optimizers and cannot be copied. Construct "
            "another and load optimizer.state_dict() into it."
        )
