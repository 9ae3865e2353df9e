"""The random state a loss was evaluated in: torch (CPU and devices), ``random``, ``numpy.random``.

Capturing happens at every call of a registered loss, so it must cost microseconds. numpy's own
``get_state`` takes 50 µs; the 2.5 kB of its Mersenne Twister are read directly to see whether
anything moved since the last capture, and the full state is taken only if it did.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TWISTER_BYTES = 625 * 4  # 624 words and the position


class _NumpyState:
    """numpy's global random state, read again only when it moved."""

    def __init__(self) -> None:
        self.raw: bytes | None = None
        self.full: dict[str, Any] = {}

    def read(self) -> tuple[bytes | None, dict[str, Any]]:
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if not isinstance(generator, np.random.MT19937):
            return None, np.random.get_state(legacy=False)  # type: ignore[return-value]
        raw = ctypes.string_at(generator.ctypes.state_address, _TWISTER_BYTES)
        # A cached normal deviate can be consumed without moving the twister.
        if raw != self.raw or self.full.get("has_gauss"):
            self.raw, self.full = raw, np.random.get_state(legacy=False)  # type: ignore[assignment]
        return self.raw, self.full


_numpy = _NumpyState()


class Randomness:
    """The state of every generator, taken by `capture` and put back by `restore`.

    Args:
        devices: accelerators whose default generators are included.
    """

    __slots__ = ("cpu", "devices", "python", "numpy")

    def __init__(self, devices: Sequence[torch.device] = ()):
        self.cpu: Tensor = torch.get_rng_state()
        self.devices = [
            (device, torch.get_device_module(device).get_rng_state(device))
            for device in devices
        ]
        self.python = random.getstate()
        self.numpy = _numpy.read()

    def restore(self) -> None:
        """Put every generator back into this state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            torch.get_device_module(device).set_rng_state(state, device)
        if random.getstate() != self.python:
            random.setstate(self.python)
        if not _same_numpy(_numpy.read(), self.numpy):
            np.random.set_state(self.numpy[1])
            _numpy.raw, _numpy.full = self.numpy

    def state_dict(self) -> dict[str, Any]:
        """The state in types that ``torch.load(weights_only=True)`` accepts."""
        version, words, gauss = self.python
        full = self.numpy[1]
        return {
            "cpu": self.cpu.clone(),
            "devices": [(str(d), s.clone()) for d, s in self.devices],
            "python": [version, list(words), gauss],
            "numpy": _plain(full),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Randomness:
        """The inverse of `state_dict`."""
        self = cls.__new__(cls)
        self.cpu = state["cpu"]
        self.devices = [(torch.device(d), s) for d, s in state["devices"]]
        version, words, gauss = state["python"]
        self.python = (version, tuple(words), gauss)
        self.numpy = (None, _arrays(state["numpy"]))
        return self


def _same_numpy(current: tuple, wanted: tuple) -> bool:
    if None in (current[0], wanted[0]):
        return False
    gauss = "has_gauss", "gauss"
    return current[0] == wanted[0] and all(
        current[1].get(key) == wanted[1].get(key) for key in gauss
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"__array__": value.tolist(), "dtype": str(value.dtype)}
    return value.item() if isinstance(value, np.generic) else value


def _arrays(value: Any) -> Any:
    if isinstance(value, dict) and "__array__" in value:
        return np.array(value["__array__"], dtype=value["dtype"])
    if isinstance(value, dict):
        return {key: _arrays(item) for key, item in value.items()}
    return value


@contextlib.contextmanager
def preserved(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Put every generator back, at exit, into the state it had at entry."""
    before = Randomness(devices)
    try:
        yield
    finally:
        before.restore()
