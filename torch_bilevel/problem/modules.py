"""The user's modules while a loss is evaluated elsewhere: buffers and training flags.

An evaluation may update BatchNorm statistics or other buffers. For its duration every buffer is
exchanged for a copy, so the user's own tensor is never touched: its values, its version counter
and the graphs that hold it stay as they are.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import parametrize

from .known import KnownFunctions

Flags = list[tuple[nn.Module, bool]]
_training = attrgetter("training")
_PLAIN = (bool, int, float, str)


class ModuleSet:
    """Modules whose buffers and training flags are guarded.

    Args:
        modules: the modules the user named; their submodules are included.
    """

    def __init__(self, modules: tuple[nn.Module, ...] = ()):
        self.members: dict[int, nn.Module] = {}
        self.searched = KnownFunctions()
        self._flags: Flags = []
        self._training: list[bool] = []
        for module in modules:
            self.add(module)

    def add(self, module: nn.Module) -> None:
        """Guard a module and its submodules."""
        for member in module.modules():
            self.members.setdefault(id(member), member)

    def discover(self, function: Callable[..., Any], arguments: tuple) -> None:
        """Add the modules that a function's closure, globals, object or arguments name."""
        if function in self.searched:
            return
        self.searched.add(function)
        for module in _reachable(function, arguments):
            self.add(module)

    @property
    def recurrent(self) -> bool:
        """Whether one of them runs cuDNN's recurrent kernels."""
        return any(isinstance(m, nn.RNNBase) for m in self.members.values())

    @property
    def weight_norm(self) -> bool:
        """Whether one of them is weight-normalised, in the new or the old way."""
        return any(
            type(m).__name__ == "_WeightNorm"
            or any(
                type(h).__name__ == "WeightNorm" for h in m._forward_pre_hooks.values()
            )
            for m in self.members.values()
        )

    def flags(self) -> Flags:
        """The training flag of every module; the same list while nothing changes."""
        training = list(map(_training, self.members.values()))
        if training != self._training:
            self._training = training
            self._flags = list(zip(self.members.values(), training, strict=True))
        return self._flags

    def buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Every buffer with its owner and name."""
        return [
            (module, name, buffer)
            for module in self.members.values()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """At exit every buffer is the tensor it was, with the values it had."""
        saved = [(m, name, b, b.detach().clone()) for m, name, b in self.buffers()]
        try:
            yield
        finally:
            for module, name, buffer, value in saved:
                module._buffers[name] = buffer
                buffer.data.copy_(value)

    @contextlib.contextmanager
    def guarded(
        self,
        flags: Flags | None = None,
        values: list[tuple[nn.Module, str, Tensor]] | None = None,
        watch: bool = False,
    ) -> Iterator[None]:
        """Evaluate inside with exchanged buffers, no backward hooks; at exit all is as before.

        Args:
            flags: training flags to evaluate with; the present ones if None.
            values: buffer values to evaluate with; the present ones if None.
            watch: look out for modules that are not members yet, and guard them before they
                run. Used for the first evaluation of a loss.
        """
        before = list(self.flags())
        given = {(id(m), name): value for m, name, value in values or ()}
        exchanged: list[tuple[nn.Module, str, Tensor]] = []
        copies: dict[int, Tensor] = {}
        hooked: list[tuple[dict, dict]] = []

        def exchange(module: nn.Module) -> None:
            # the user's hooks are for gradients of the loss, not for rows of H v
            for hooks in (module._backward_hooks, module._backward_pre_hooks):
                if hooks:
                    hooked.append((hooks, dict(hooks)))
                    hooks.clear()
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    exchanged.append((module, name, buffer))
                    value = given.get((id(module), name), buffer)
                    copy = copies.setdefault(id(buffer), value.detach().clone())
                    module._buffers[name] = copy

        def on_forward(module: nn.Module, _: Any) -> None:
            if id(module) not in self.members:
                for member in module.modules():
                    if id(member) not in self.members:
                        self.members[id(member)] = member
                        before.append((member, member.training))
                        exchange(member)

        # what parametrizations computed inside the caller's `cached()` has another graph
        cached = parametrize._cache_enabled, parametrize._cache
        parametrize._cache_enabled, parametrize._cache = 0, {}
        try:
            for module in list(self.members.values()):
                exchange(module)
            for module, training in flags or ():
                module.training = training
            with _watching(on_forward) if watch else contextlib.nullcontext():
                yield
        finally:
            parametrize._cache_enabled, parametrize._cache = cached
            for hooks, known in hooked:
                hooks.update(known)
            for module, name, buffer in exchanged:
                module._buffers[name] = buffer
            for module, training in before:
                module.training = training


@contextlib.contextmanager
def _watching(on_forward: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Call ``on_forward`` before every module's forward."""
    handle = register_module_forward_pre_hook(on_forward)
    try:
        with warnings.catch_warnings():
            # about global hooks and compiled modules, which run eagerly in here
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            yield
    finally:
        handle.remove()


def reachable_numbers(function: Callable[..., Any], modules: Iterable[Any]) -> tuple:
    """The numbers, flags and words a function can name, and those that modules hold, in order."""
    found: list[Any] = []
    _reachable(function, (), found)
    for module in modules:
        found += [v for v in vars(module).values() if isinstance(v, _PLAIN)]
    return tuple((type(value), value) for value in found)


def _reachable(
    function: Callable[..., Any], arguments: tuple, plain: list[Any] | None = None
) -> list[nn.Module]:
    """Modules a function can name: through closures, globals, objects and helper functions.

    Args:
        function: the function.
        arguments: what it is called with.
        plain: gets the numbers, flags and words it can name.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()

    def look(value: Any, depth: int) -> None:
        if plain is not None and isinstance(value, _PLAIN):
            plain.append(value)
        elif isinstance(value, nn.Module):
            found.append(value)
        elif not depth or id(value) in seen or isinstance(value, (Tensor, type)):
            return
        elif isinstance(value, (list, tuple)):
            for item in value[:64]:
                look(item, depth - 1)
        elif isinstance(value, dict):
            for item in list(value.values())[:64]:
                look(item, depth - 1)
        elif _own_function(value):
            seen.add(id(value))
            look_into(value, depth - 1)
        elif _plain_object(value):
            seen.add(id(value))
            for item in list(vars(value).values()):
                look(item, depth - 1)

    def look_into(function: Any, depth: int) -> None:
        inner = inspect.unwrap(function)
        while hasattr(inner, "func") and hasattr(
            inner, "keywords"
        ):  # functools.partial
            look((inner.args, inner.keywords), depth)
            inner = inspect.unwrap(inner.func)
        look(getattr(inner, "__self__", None), depth)
        bare = getattr(inner, "__func__", inner)
        for cell in getattr(bare, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                look(cell.cell_contents, depth)
        names = getattr(getattr(bare, "__code__", None), "co_names", ())
        space = getattr(bare, "__globals__", {})
        for name in names:
            look(space.get(name), depth)
        look(getattr(bare, "__defaults__", None), depth)

    look_into(function, 4)
    look(arguments, 3)
    return found


def _own_function(value: Any) -> bool:
    return (
        inspect.isfunction(value) or inspect.ismethod(value)
    ) and value.__module__.split(".")[0] not in ("torch", "numpy", "torch_bilevel")


def _plain_object(value: Any) -> bool:
    kind = type(value)
    return (
        hasattr(value, "__dict__")
        and not callable(value)
        and kind.__module__.split(".")[0] not in ("torch", "numpy", "builtins")
        and not inspect.ismodule(value)
        and not isinstance(value, torch.optim.Optimizer)
    )
