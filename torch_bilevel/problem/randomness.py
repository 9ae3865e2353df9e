"""The random state a loss was evaluated in: torch (CPU and devices), ``random``, ``numpy.random``.

Capturing happens at every call of a registered loss, so it must cost next to nothing, also with
caches that a matrix product has just emptied. All three generators on the CPU are Mersenne
twisters, and reading one in full takes 5 to 50 µs; so the full state is read only when the twister
moved. That shows in its position, which every draw advances, and in its first words, which change
when the position starts again. Both are read where the generator keeps them in memory, after a
check that they are there; where they are not, the full state is read every time.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORDS = 624  # of a Mersenne Twister's state; 4 bytes each


def _memory(address: int, size: int) -> memoryview:
    """Bytes at an address, read anew at every use."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


class _NumpyState:
    """numpy's global random state, read again only when it moved."""

    def __init__(self) -> None:
        self.generator: Any = None
        self.first = self.position = memoryview(b"")
        self.mark: Any = None
        self.full: dict[str, Any] = {}

    def read(self) -> tuple[Any, dict[str, Any]]:
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if generator is not self.generator:
            if not isinstance(generator, np.random.MT19937):
                return None, np.random.get_state(legacy=False)  # type: ignore[return-value]
            self.generator = generator
            address = generator.ctypes.state_address  # 624 words, then the position
            self.first = _memory(address, 16)
            self.position = _memory(address + 4 * _WORDS, 4)
            self.mark = None
        mark = self.first.tobytes(), self.position.tobytes(), id(generator)
        # A cached normal deviate can be consumed without moving the twister.
        if mark != self.mark or self.full["has_gauss"]:
            self.mark, self.full = mark, np.random.get_state(legacy=False)  # type: ignore[assignment]
        return self.mark, self.full


class _PythonState:
    """The state of ``random``, read again only when it moved.

    CPython keeps position and words of the twister right behind the object's header.
    """

    def __init__(self) -> None:
        self.owner = random.random.__self__  # type: ignore[attr-defined]
        address = id(self.owner) + object.__basicsize__
        self.mark: Any = None
        self.full: Any = random.getstate()
        words = self.full[1]
        expected = b"".join(
            word.to_bytes(4, sys.byteorder) for word in (words[-1], *words[:-1])
        )
        size = 4 * (_WORDS + 1)
        readable = (
            sys.implementation.name == "cpython"
            and type(self.owner).__basicsize__ >= object.__basicsize__ + size
            and ctypes.string_at(address, size) == expected
        )
        self.near = _memory(address, 20) if readable else None

    def read(self) -> Any:
        if self.near is None:
            return random.getstate()
        mark = self.near.tobytes(), self.owner.gauss_next  # type: ignore[attr-defined]
        if mark != self.mark:
            self.mark, self.full = mark, random.getstate()
        return self.full


class _TorchState:
    """The CPU generator's state, shared while it stands still.

    States that differ are copied into the rows of a slab: thousands of 5 kB allocations that
    outlive the step would pin the holes that activations leave in the heap, which made a loop
    grow by 0.5 MiB a step without holding anything.
    """

    ROWS = 128

    def __init__(self) -> None:
        self.pieces = _torch_twister()
        self.mark: Any = None
        self.last = torch.get_rng_state()
        self.slab: Tensor | None = None
        self.used = 0

    def read(self) -> Tensor:
        if self.pieces is not None:
            mark = list(map(_bytes, self.pieces))
            if mark == self.mark:
                return self.last
            self.mark = mark
        now = torch.get_rng_state()
        if torch.equal(now, self.last):
            return self.last
        if self.slab is None or self.used == self.ROWS:
            self.slab, self.used = now.new_empty((self.ROWS, now.numel())), 0
        self.last = self.slab[self.used].copy_(now)
        self.used += 1
        return self.last

    def stands_at(self, state: Tensor) -> bool:
        """Whether the generator is known to be in a state: in the one that was read last."""
        if self.pieces is None or self.last is not state:
            return False
        return list(map(_bytes, self.pieces)) == self.mark


def _torch_twister() -> tuple[memoryview, memoryview] | None:
    """What a draw from torch's CPU generator changes, in place; None if not laid out as known.

    In ``get_state()``: seed (8 bytes), draws left (4), seeded (4), position (8), words of 8 bytes.
    In memory: seed (8), left, seeded, position and words of 4 bytes each, cached normals (28).
    """
    address = getattr(torch.default_generator, "_cdata", None)
    state = bytes(torch.default_generator.get_state().numpy())
    if address is None or sys.byteorder != "little" or len(state) != 5056:
        return None
    head = struct.unpack("<QiiQ", state[:24])
    words = struct.unpack(f"<{_WORDS}Q", state[24:5016])
    pattern = struct.pack(f"<Qi?xxxI{_WORDS}I", *head, *words)
    at = ctypes.string_at(address, len(pattern) + 96).find(pattern)
    if at < 0:
        return None
    return _memory(address + at, 36), _memory(address + at + len(pattern), 28)


_torch = _TorchState()
_numpy = _NumpyState()
_python = _PythonState()
_twister = _python.owner
_bytes = memoryview.tobytes
_bit_generator = np.random.get_bit_generator  # type: ignore[attr-defined]


# What every draw on the CPU changes, in one tuple; empty where it cannot be read in place.
_places: tuple[memoryview, ...] = ()
_last: tuple[list[bytes], Any, Any, Randomness | None] = [], None, None, None


def capture(devices: Sequence[torch.device] = ()) -> Randomness:
    """The present state; the same object while no generator moved.

    On the path of every inner step. Every Python frame costs microseconds when the caches are
    cold, and so does every object it looks at: hence one comparison of bytes.
    """
    global _places, _last
    generator = _bit_generator()
    marks, gauss, numpys, randomness = _last
    if (
        not devices
        and generator is numpys
        and list(map(_bytes, _places)) == marks
        and _twister.gauss_next == gauss  # type: ignore[attr-defined]
        and randomness is not None
    ):
        return randomness
    randomness = Randomness(devices)
    # numpy's cached normal deviate can be consumed without moving its twister.
    readable = _torch.pieces and _python.near and generator is _numpy.generator
    if not devices and readable and not _numpy.full["has_gauss"]:
        _places = (*_torch.pieces, _python.near, _numpy.first, _numpy.position)  # type: ignore
        marks = list(map(_bytes, _places))
        _last = marks, _twister.gauss_next, generator, randomness  # type: ignore
    else:
        _last = [], None, None, None
    return randomness


class Randomness:
    """The state of every generator when it is made, put back by `restore`.

    Args:
        devices: accelerators whose default generators are included.
    """

    __slots__ = ("cpu", "devices", "python", "numpy")

    def __init__(self, devices: Sequence[torch.device] = ()):
        self.cpu = _torch.read()
        self.devices = [
            (device, torch.get_device_module(device).get_rng_state(device))
            for device in devices
        ]
        self.python = _python.read()
        self.numpy = _numpy.read()

    def restore(self) -> None:
        """Put every generator back into this state."""
        if not _torch.stands_at(self.cpu):
            torch.set_rng_state(self.cpu.clone())  # torch crashes on a row of a slab
        for device, state in self.devices:
            torch.get_device_module(device).set_rng_state(state, device)
        if _python.read() != self.python:
            random.setstate(self.python)
        if not _same_numpy(_numpy.read(), self.numpy):
            np.random.set_state(self.numpy[1])
            _numpy.mark, _numpy.full = self.numpy

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
