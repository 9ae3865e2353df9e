"""The bilevel problem at the user's live parameters.

    min_x f(x, y*(x)),    y*(x) = argmin_y g(x, y)

`BilevelProblem` evaluates recorded calls of f and g at the present (or an overwritten) point
and hands out gradients and linearisations as flat vectors. It owns every precaution that
evaluating somebody else's program elsewhere needs; estimators never see a module or a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import Disconnected, NonSymmetricSystem
from ..second_order import second_order
from .calls import (
    AutocastState,
    Call,
    WeightedCall,
    autocast,
    fresh_containers,
    residual,
    scalar,
)
from .known import KnownFunctions
from .linearization import Linearization
from .modules import ModuleSet
from .once import raise_if_no_second_derivative, refuse_once_differentiable
from .precision import look_at
from .randomness import preserved
from .variables import Variables, added, gradients

evaluations: list[Call] = []  # calls being evaluated by the library, in any problem


@dataclass
class OuterGradients:
    """Value and partial gradients of the outer loss at the present point.

    Attributes:
        value: the outer loss, 0-d, detached.
        inner: ∂_y f as a flat vector.
        outer: ∂_x f as a flat vector.
        reached: per outer tensor, whether f depends on it directly.
    """

    value: Tensor
    inner: Tensor
    outer: Tensor
    reached: list[bool]


class BilevelProblem:
    """Inner and outer variables, and how to evaluate recorded losses on them.

    Args:
        inner: the inner variables y.
        outer: the outer variables x.
        modules: modules whose buffers and flags are guarded during evaluations.
    """

    def __init__(self, inner: Variables, outer: Variables, modules: ModuleSet):
        self.inner = inner
        self.outer = outer
        self.modules = modules
        self.num_products = 0
        self.recorded: dict[Any, Any] = {}  # what engines keep from point to point
        self._watched = KnownFunctions()
        self._twice = KnownFunctions()  # known to be twice differentiable
        self.walked = KnownFunctions()  # their graphs were looked through
        self.dtypes = KnownFunctions()  # what they compute in
        self.kept_right = KnownFunctions()  # their kept graphs agree with new ones
        tensors = inner.tensors + outer.tensors
        self.live = inner.ids | outer.ids
        # What the user's own inner call sees as constants.
        self.constants = [tensor for tensor in outer.tensors if tensor not in inner]
        # What losses depend on as outer variables: an initialisation, which is also an inner
        # variable, enters through the first iterate only.
        self.direct = [None if tensor in inner else tensor for tensor in outer.tensors]
        self.initial = _common(inner, outer)
        self.device_types = tuple(
            dict.fromkeys([*(t.device.type for t in tensors), "cpu"])
        )
        self.no_autocast: AutocastState = [(k, False, None) for k in self.device_types]
        devices = dict.fromkeys(t.device for t in tensors)
        self.devices = [device for device in devices if device.type != "cpu"]

    def from_initial(self, vector: Tensor) -> Tensor:
        """An adjoint of the first iterate as a gradient of the initialisations in x, flat.

        Args:
            vector: flat, of the inner layout.
        """
        result = self.outer.layout.zeros()
        for here, there in self.initial:
            result[there] = vector[here].to(result)
        return result

    def to_initial(self, directions: Tensor) -> Tensor:
        """Tangents of the first iterate along directions of x, a row for each.

        Args:
            directions: (count, outer numel).
        """
        layout = self.inner.layout
        shape = len(directions), layout.numel
        result = torch.zeros(shape, dtype=layout.dtype, device=layout.device)
        for here, there in self.initial:
            result[:, here] = directions[:, there].to(result)
        return result

    @contextlib.contextmanager
    def evaluating(self, call: Call, once: bool = False) -> Iterator[None]:
        """Everything under which a recorded call is evaluated, and differentiated, again.

        Generators, buffers, training flags and ``requires_grad`` flags are put back at exit.

        Args:
            call: the call.
            once: it is differentiated once only, with the kernels the user's own call ran.
        """
        watch = call.function not in self._watched
        with contextlib.ExitStack() as stack:
            # Registered losses that the function calls are plain functions meanwhile.
            stack.callback(evaluations.pop)
            evaluations.append(call)
            # A backward is not to run under the caller's autocast; `run` enters the recorded.
            stack.enter_context(autocast(self.no_autocast))
            stack.enter_context(preserved(self.devices))
            stack.enter_context(
                self.modules.guarded(call.flags, call.buffers, watch=watch)
            )
            if not once:
                stack.enter_context(
                    second_order(  # at first, modules may be met that are not known yet
                        self.modules.recurrent or watch,
                        self.modules.weight_norm or watch,
                    )
                )
            stack.enter_context(torch.enable_grad())
            wanted = [(tensor, True) for tensor in self.constants]
            constant = call.frozen - self.inner.moved if call.frozen else call.frozen
            wanted += [(t, id(t) not in constant) for t in self.inner.tensors]
            for tensor, flag in wanted:
                if tensor.requires_grad != flag:
                    stack.callback(tensor.requires_grad_, not flag)
                    tensor.requires_grad_(flag)
            if call.randomness is not None:
                call.randomness.restore()
            try:
                yield
            except RuntimeError as error:
                raise_if_no_second_derivative(error)
                raise
        self._watched.add(call.function)

    def _again(self, call: Call) -> Any:
        call.check_unchanged()
        with autocast(call.autocast):
            return call.function(
                *fresh_containers(call.args), **fresh_containers(call.kwargs)
            )

    def _map_residual(
        self, call: Call, weight: Any, create_graph: bool, outer: bool
    ) -> list[Tensor | None]:
        if outer:
            raise NonSymmetricSystem(
                f"The inner problem is the fixed point of {call.name!r}, which is not the minimum "
                "of a loss. Forward mode and finite differences of a loss do not know it; use "
                "'gmres', 'neumann', 'richardson', 'sid' or 'unrolled'."
            )
        with torch.set_grad_enabled(create_graph):
            parts = residual(call, self._again(call), self.inner.tensors)
        return [part * weight for part in parts]

    def run(self, call: Call) -> Any:
        """What a call returns at the present point, with its graph; inside `evaluating`.

        Raises:
            Disconnected: the loss has no graph.
        """
        result = self._again(call)
        if not (loss := scalar(result, call.name)).requires_grad:
            raise Disconnected(
                f"The registered loss {call.name!r} does not depend on any inner or outer "
                "parameter: the tensor it returned has no graph. Was it computed under "
                "torch.no_grad(), from detached values, or with .item()?"
            )
        if call.function not in self.dtypes:
            look_at(self, call, loss)
        return result

    def look_through(
        self,
        call: Call,
        parts: Sequence[Tensor | None],
        losses: Sequence[Tensor],
        leaves: Sequence[Tensor] = (),
    ) -> None:
        """Refuse functions that are differentiable once only; see `once`."""
        if call.function not in self._twice:
            inner = self.inner.ids | {id(leaf) for leaf in leaves}
            refuse_once_differentiable(parts, losses, call.name, inner)
            self._twice.add(call.function)

    def value(self, call: Call) -> Tensor:
        """The loss of a call at the present point; inside `evaluating`."""
        return scalar(self._again(call), call.name)

    def inner_gradients(
        self,
        calls: Sequence[WeightedCall],
        create_graph: bool = False,
        outer: bool = False,
        once: bool = False,
    ) -> list[Tensor | None]:
        """∇_y Σ w g(x, y), call by call in the order of the user's own backwards.

        Args:
            calls: recorded calls with their weights.
            create_graph: keep the graph, for products.
            outer: append ∇_x Σ w g(x, y).
            once: with the kernels the user's own calls ran, which have no second derivative.

        Returns:
            One tensor per inner parameter (and per outer tensor), None where no call reaches it.

        Raises:
            Disconnected: a call reaches no inner parameter.
        """
        wanted = [*self.inner.tensors, *(self.direct if outer else ())]
        total: list[Tensor | None] = [None] * len(wanted)
        for call, weight in calls:
            with self.evaluating(call, once):
                if call.is_map:
                    parts = self._map_residual(call, weight, create_graph, outer)
                else:
                    loss = scalar(self.run(call), call.name)
                    (parts,) = gradients(
                        loss,
                        like(weight, loss),
                        wanted,
                        create_graph=create_graph,
                    )
                    if create_graph:
                        self.look_through(call, parts, [loss])
                # what is frozen and moved has a gradient that no step consumes
                if call.frozen and not (create_graph and outer):
                    held = [id(tensor) in call.frozen for tensor in self.inner.tensors]
                    parts[: len(held)] = [
                        None if there else part
                        for part, there in zip(parts, held, strict=False)
                    ]
                total = added(total, parts)  # here, for outside there may be no_grad
            if all(part is None for part in parts[: len(self.inner.tensors)]):
                raise Disconnected(
                    f"The inner loss {call.name!r} does not depend on any inner parameter "
                    f"({_few(self.inner)})."
                )
        return total

    def linearize(
        self, calls: Sequence[WeightedCall], outer: bool = False
    ) -> Linearization:
        """Differentiate Σ w g once, at the present point, for any number of products.

        Args:
            calls: recorded calls with their weights; their graphs live together.
            outer: with respect to the outer variables too, for tangents.

        Returns:
            The linearisation; it refuses to be used after the parameters moved.
        """
        parts = self.inner_gradients(calls, create_graph=True, outer=outer)
        count = len(self.inner.tensors)
        symmetric = not any(call.is_map for call, _ in calls)
        return Linearization(self, parts[:count], parts[count:], symmetric=symmetric)

    def kept(self, calls: Sequence[WeightedCall]) -> Linearization | None:
        """As `linearize`, from the graphs kept of the user's own evaluations; None without any.

        Raises:
            BatchChanged: an argument was changed in place since.
        """
        total: list[Tensor | None] = [None] * len(self.inner.tensors)
        for call, weight in calls:
            call.check_unchanged()
            if call.kept is None or call.kept.weight is None:
                return None
            if call.frozen & self.inner.moved:  # constants to the user's own graph
                return None
            with torch.enable_grad():  # this may run inside a backward
                total = added(total, call.kept.weighted(weight))
        return Linearization(self, total, reusable=True)

    def places(self) -> tuple[dict[int, int], set[int]]:
        """What a kept graph need not copy, and what it must, by the address of its storage.

        Returns:
            Inner parameters that have a contiguous storage of their own, by index; other inner
            parameters and buffers, which are written to in place.
        """
        found: dict[int, int] = {}
        others = {b.untyped_storage().data_ptr() for _, _, b in self.modules.buffers()}
        for index, tensor in enumerate(self.inner.tensors):
            address = tensor.untyped_storage().data_ptr()
            own = tensor.is_contiguous() and tensor.storage_offset() == 0
            if not own or address in found or address in others:
                others.add(address)
                found.pop(address, None)
            else:
                found[address] = index
        return found, others

    def no_outer_loss(self) -> OuterGradients:
        """Zero, for estimators that need no outer loss."""
        inner, outer = self.inner.layout, self.outer.layout
        value = torch.zeros((), dtype=inner.dtype, device=inner.device)
        reached = [False] * len(self.outer.tensors)
        return OuterGradients(value, inner.zeros(), outer.zeros(), reached)

    def outer_gradients(
        self, calls: Sequence[WeightedCall], values: Sequence[Tensor] | None = None
    ) -> OuterGradients:
        """Value, ∂_y f and ∂_x f of Σ w f.

        Args:
            calls: recorded calls of outer losses with their weights.
            values: their losses, with graphs, if already evaluated at this point.
        """
        total: list[Tensor] = []
        reached = [False] * len(self.outer.tensors)
        touched = False
        for index, (call, weight) in enumerate(calls):
            with self.evaluating(call):
                loss = (
                    scalar(self.run(call), call.name)
                    if values is None
                    else values[index]
                )
                seed = like(weight, loss)
                to_inner, to_outer = gradients(
                    loss,
                    seed,
                    self.inner.tensors,
                    self.direct,
                    retain_graph=values is not None,
                )
            touched |= any(part is not None for part in to_inner)
            reached = [
                known or part is not None
                for known, part in zip(reached, to_outer, strict=True)
            ]
            part = [
                (loss.detach() * seed).reshape(()),
                self.inner.layout.flatten(to_inner),
                self.outer.layout.flatten(to_outer),
            ]
            total = list(map(torch.add, total, part)) if total else part
        if not touched:
            raise Disconnected(
                f"The outer loss {calls[0][0].name!r} does not depend on any inner parameter "
                f"({_few(self.inner)}), so there is nothing to differentiate through the "
                "inner loop. Does it use the model that the inner optimizer trains?"
            )
        value, inner, outer = total
        return OuterGradients(value, inner, outer, reached)


def _common(inner: Variables, outer: Variables) -> list[tuple[slice, slice]]:
    """Where the tensors that are in both levels lie in either flat vector."""
    places, start = {}, 0
    for tensor, size in zip(inner.tensors, inner.layout.sizes, strict=True):
        places[id(tensor)] = slice(start, start + size)
        start += size
    found, start = [], 0
    for tensor, size in zip(outer.tensors, outer.layout.sizes, strict=True):
        if id(tensor) in places:
            found.append((places[id(tensor)], slice(start, start + size)))
        start += size
    return found


def like(weight: Any, loss: Tensor) -> Tensor:
    """A weight as the incoming gradient of a loss."""
    weight = torch.as_tensor(weight, dtype=loss.dtype, device=loss.device)
    return weight.reshape(loss.shape)


def _few(variables: Variables) -> str:
    names = variables.layout.names
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
