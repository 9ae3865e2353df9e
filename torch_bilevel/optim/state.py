"""Saving and loading a `BilevelOptimizer`, in types ``torch.load(weights_only=True)`` accepts.

What is saved beyond the two optimizers: the values of the outer variables, counters, adjoints and
eigenvalue estimates, the position in the outer data, the history, and the steps recorded since the
last outer step, with the batches they refer to. Losses are saved by name; closures never.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BilevelError, BilevelWarning
from ..estimators import EstimatorMemory
from ..inner import Part, StepRecord, Tangents
from ..problem import Call, Randomness
from ..solvers import Memory
from .maps import FixedPointMap
from .report import Report

if TYPE_CHECKING:
    from .bilevel import BilevelOptimizer

VERSION = 1


def save(optimizer: BilevelOptimizer) -> dict[str, Any]:
    """See `BilevelOptimizer.state_dict`."""
    recorder = optimizer._recorder
    if optimizer._task is not None:
        raise BilevelError(
            "state_dict() was called inside a task. Save between tasks: a task puts everything "
            "back at its end, so there is nothing in it to resume."
        )
    return {
        "version": VERSION,
        "inner": [copy.deepcopy(o.state_dict()) for o in optimizer.inners],
        "outer": copy.deepcopy(optimizer.outer.state_dict()),
        "outer_values": [t.detach().clone() for t in optimizer.problem.outer.tensors],
        "estimator": str(optimizer.estimator),
        "outer_steps": optimizer.outer_steps,
        "inner_steps": recorder.epoch,
        "position": recorder.position,
        "start": optimizer._start and [t.clone() for t in optimizer._start],
        "begins": recorder.beginning is not None,
        "tasks": [optimizer._tasks_done, optimizer._tasks_begun],
        "outer_gradients": [  # of the tasks since the last outer step
            _clone(t.grad) if optimizer._tasks_done else None
            for t in optimizer.problem.outer.tensors
        ],
        "memories": [
            {
                "losses": list(names),
                "adjoint": _clone(memory.adjoint),
                "eigenvalue": _clone(memory.solver.eigenvalue),
                "eigenvector": _clone(memory.solver.eigenvector),
                "smallest": _clone(memory.solver.smallest),
                "directions": copy.deepcopy(memory.directions),
            }
            for names, memory in optimizer._memories.items()
        ],
        "data": _positions(optimizer.outer_losses),
        "inner_data": _positions(optimizer.inner_losses),
        "sampler": optimizer._sampler.state_dict(),
        "history": [report.as_dict() for report in optimizer.history],
        "window": _save_window(optimizer),
    }


def load(optimizer: BilevelOptimizer, saved: dict[str, Any]) -> None:
    """See `BilevelOptimizer.load_state_dict`.

    Raises:
        BilevelError: it was saved by another version, number of optimizers, or set of losses.
    """
    if not isinstance(saved, dict) or saved.get("version") != VERSION:
        raise BilevelError(
            "This is not a state_dict of a BilevelOptimizer of this version (keys: "
            f"{', '.join(map(str, list(saved)[:6]))})."
        )
    if len(saved["inner"]) != len(optimizer.inners):
        raise BilevelError(
            f"The state_dict has {len(saved['inner'])} inner optimizers, this optimizer has "
            f"{len(optimizer.inners)}."
        )
    for one, values in zip(optimizer.inners, saved["inner"], strict=True):
        one.load_state_dict(copy.deepcopy(values))
    optimizer.outer.load_state_dict(copy.deepcopy(saved["outer"]))
    values, tensors = saved["outer_values"], optimizer.problem.outer.tensors
    if [v.shape for v in values] != [t.shape for t in tensors]:
        raise BilevelError(
            f"The state_dict has outer variables of shapes {[tuple(v.shape) for v in values]}, "
            f"this optimizer of shapes {[tuple(t.shape) for t in tensors]}."
        )
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
    recorder = optimizer._recorder
    recorder.restart()
    recorder.epoch = saved["inner_steps"]
    recorder.position = saved["position"]
    optimizer._start = saved["start"] and [t.clone() for t in saved["start"]]
    if not saved["begins"]:
        recorder.beginning = None
    optimizer._tasks_done, optimizer._tasks_begun = saved["tasks"]
    if optimizer._tasks_done:
        for tensor, gradient in zip(tensors, saved["outer_gradients"], strict=True):
            tensor.grad = _clone(gradient)
    recorder.verify_next, recorder.to_verify = True, None
    optimizer.outer_steps = saved["outer_steps"]
    optimizer._found.clear()
    optimizer._memories = {
        tuple(item["losses"]): EstimatorMemory(
            _clone(item["adjoint"]),
            Memory(
                _clone(item["eigenvalue"]),
                _clone(item["eigenvector"]),
                _clone(item["smallest"]),
            ),
            copy.deepcopy(item["directions"]),
        )
        for item in saved["memories"]
    }
    for role in ("outer", "inner"):
        losses = getattr(optimizer, f"{role}_losses")
        for name, position in saved[
            "data" if role == "outer" else "inner_data"
        ].items():
            loss = losses.get(name)
            if loss is None or loss.data is None:
                raise BilevelError(
                    f"The state_dict has a data position for the {role} loss {name!r}, which is "
                    "not registered with data= here. Register the same losses before loading."
                )
            loss.data.load_state_dict(position)
    optimizer._sampler.load_state_dict(saved["sampler"])
    optimizer.history.clear()
    optimizer.history.extend(Report.from_dict(item) for item in saved["history"])
    optimizer.last_report = optimizer.history[-1] if optimizer.history else None
    _load_window(optimizer, saved["window"])


def _positions(losses: Mapping[str, Any]) -> dict[str, Any]:
    """Per loss with data, where in it drawing is."""
    return {
        name: loss.data.state_dict()
        for name, loss in losses.items()
        if loss.data is not None
    }


def _clone(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()


class _Unsavable(Exception):
    pass


def _save_window(optimizer: BilevelOptimizer) -> dict[str, Any]:
    window = optimizer._recorder.window
    names = {loss.function: name for name, loss in optimizer.inner_losses.items()}
    try:
        records = [_save_record(optimizer, record, names) for record in window]
    except _Unsavable as reason:
        warnings.warn(
            f"The {len(window)} inner steps recorded since the last outer step are not part of "
            f"this state_dict: {reason}. A run resumed from it starts a new window; save right "
            "after an outer step for an exact resume.",
            BilevelWarning,
            stacklevel=4,
        )
        return {
            "count": 0,
            "number": window.number,
            "interval": window.first_interval,
            "tangents": None,
            "records": [],
        }
    return {
        "count": window.count,
        "number": window.number,
        "interval": window.interval,
        "moved": list(window.moved),
        "tangents": window.tangents and window.tangents.state_dict(),
        "records": records,
    }


def _save_record(
    optimizer: BilevelOptimizer, record: StepRecord, names: dict[Any, str]
) -> dict[str, Any]:
    return {
        "index": record.index,
        "position": record.position,
        "opaque": record.opaque,
        "rewritten": record.rewritten,
        "calls": [
            [_save_call(optimizer, call, names), _encode(optimizer, weight)]
            for call, weight in record.calls
        ],
        "parts": [
            [
                number,
                {
                    "hyper": _encode(optimizer, part.hyper),
                    "groups": list(part.groups),
                    "present": list(part.present),
                    "values": _encode(optimizer, part.values),
                    "state": _encode(optimizer, part.state),
                },
            ]
            for number, part in record.parts.items()
        ],
    }


def _save_call(
    optimizer: BilevelOptimizer, call: Call, names: dict[Any, str]
) -> dict[str, Any]:
    order = {id(m): i for i, m in enumerate(optimizer._modules.members.values())}
    call.check_unchanged()
    data = optimizer.inner_losses[names[call.function]].data
    batches = data and data.numbered
    return {
        "loss": names[call.function],
        "number": batches and batches.number((*call.args, *call.kwargs.values())),
        "args": _encode(optimizer, call.args),
        "kwargs": _encode(optimizer, call.kwargs),
        "randomness": call.randomness and call.randomness.state_dict(),
        "autocast": [
            [k, on, d and str(d).removeprefix("torch.")] for k, on, d in call.autocast
        ],
        "flags": [[order[id(m)], on] for m, on in call.flags or ()],
        "frozen": [
            i
            for i, t in enumerate(optimizer.problem.inner.tensors)
            if id(t) in call.frozen
        ],
        "buffers": None
        if call.buffers is None
        else [[order[id(m)], name, value.clone()] for m, name, value in call.buffers],
    }


def _load_window(optimizer: BilevelOptimizer, saved: dict[str, Any]) -> None:
    window = optimizer._recorder.window
    for loss in optimizer.inner_losses.values():
        optimizer._modules.discover(loss.function, ())
    window.interval = saved["interval"]  # before records are appended
    for item in saved["records"]:
        calls = [
            (_load_call(optimizer, call), _decode(optimizer, weight))
            for call, weight in item["calls"]
        ]
        record = StepRecord(
            calls,
            item["index"],
            item["position"],
            opaque=item["opaque"],
            rewritten=item.get("rewritten", False),
        )
        for number, part in item["parts"]:
            record.parts[number] = Part(
                hyper=_decode(optimizer, part["hyper"]),
                groups=part["groups"],
                present=part["present"],
                values=_decode(optimizer, part["values"]),
                state=_decode(optimizer, part["state"]),
            )
        window.append(record)
    window.count, window.number = saved["count"], saved["number"]
    if "moved" in saved:  # by steps that are no longer recorded, too
        window.moved = list(saved["moved"])
    if saved["tangents"] is not None:
        window.tangents = Tangents.from_state_dict(optimizer.problem, saved["tangents"])


def _load_call(optimizer: BilevelOptimizer, saved: dict[str, Any]) -> Call:
    if saved["loss"] not in optimizer.inner_losses:
        raise BilevelError(
            f"The state_dict refers to the inner loss {saved['loss']!r}, which is not "
            "registered. Register the same losses before loading."
        )
    modules = list(optimizer._modules.members.values())
    loss = optimizer.inner_losses[saved["loss"]]
    args, kwargs = (
        _decode(optimizer, saved["args"]),
        _decode(optimizer, saved["kwargs"]),
    )
    batches = loss.data and loss.data.numbered
    if batches is not None and saved["number"] is not None:
        batches.moved((*args, *kwargs.values()), None, saved["number"])
    known = (*optimizer.problem.inner.ids, *optimizer.problem.outer.ids)
    tensors = [t for t in _tensors((args, kwargs)) if id(t) not in known]
    try:
        flags = [(modules[i], on) for i, on in saved["flags"]]
        buffers = saved["buffers"] and [
            (modules[i], name, value) for i, name, value in saved["buffers"]
        ]
    except IndexError:
        raise BilevelError(
            "The state_dict refers to modules this optimizer does not know yet. Pass "
            "modules=model to the constructor."
        ) from None
    return Call(
        function=loss.function,
        args=args,
        kwargs=kwargs,
        name=loss.name,
        versions=[(tensor, tensor._version) for tensor in tensors],
        randomness=saved["randomness"]
        and Randomness.from_state_dict(saved["randomness"]),
        autocast=[(k, on, d and getattr(torch, d)) for k, on, d in saved["autocast"]],
        is_map=isinstance(loss, FixedPointMap),
        flags=flags,
        buffers=buffers,
        frozen={id(optimizer.problem.inner.tensors[i]) for i in saved["frozen"]},
    )


def _encode(optimizer: BilevelOptimizer, value: Any) -> Any:
    """Nested containers of plain values and tensors as dicts, lists and tensors."""
    if isinstance(value, Tensor):
        for role in ("inner", "outer"):
            tensors = getattr(optimizer.problem, role).tensors
            for index, tensor in enumerate(tensors):
                if tensor is value:
                    return {"kind": role, "index": index}
        return value.detach().clone()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise _Unsavable(
                "an argument is a dictionary with keys that are not strings"
            )
        items = {key: _encode(optimizer, item) for key, item in value.items()}
        return {"kind": "dict", "items": items}
    if type(value) in (list, tuple):
        items = [_encode(optimizer, item) for item in value]
        return items if type(value) is list else {"kind": "tuple", "items": items}
    raise _Unsavable(f"an argument of a registered loss is a {type(value).__name__}")


def _decode(optimizer: BilevelOptimizer, value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(optimizer, item) for item in value]
    if isinstance(value, Tensor):
        return value.clone()  # what is saved stays as it is
    if not isinstance(value, dict):
        return value
    kind = value["kind"]
    if kind == "dict":
        return {key: _decode(optimizer, item) for key, item in value["items"].items()}
    if kind == "tuple":
        return tuple(_decode(optimizer, item) for item in value["items"])
    return getattr(optimizer.problem, kind).tensors[value["index"]]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
