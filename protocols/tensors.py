"""Tensors as they travel: a number format, a shape, and packed bytes; and their conversion from and to numpy.

In memory both sides compute in float32; numpy has no bfloat16, so rounding to it is done here on the bit pattern.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from .errors import MalformedMessage

DType: TypeAlias = Literal["float32", "bfloat16"]
State: TypeAlias = dict[str, NDArray[np.float32]]
"""Named float32 arrays: an adapter, an update, or the state of a server optimiser."""

Arrays: TypeAlias = Mapping[str, NDArray[np.float32]]
"""The same where it is only read, and may be `Made` as it is read."""

ITEM_BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2}


@final
class Made(Mapping[str, NDArray[np.float32]]):
    """Named arrays of which each is made whenever it is asked for, so that there need not be two at a time."""

    def __init__(self, names: Iterable[str], make: Callable[[str], NDArray[np.float32]]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # that of Mapping would make it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, slots=True)
class Tensor:
    """Row-major, little-endian values. `len(data)` is the product of `shape` times the size of one value.

    Raises:
        MalformedMessage: when it is not.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: bytes | memoryview

    def __post_init__(self) -> None:
        expected = math.prod(self.shape) * ITEM_BYTES[self.dtype]
        if len(self.data) != expected:
            raise MalformedMessage(
                f"a {self.dtype} tensor of shape {self.shape} needs {expected} bytes, not {len(self.data)}"
            )


def pack(array: NDArray[np.float32], dtype: DType) -> Tensor:
    """`array` as a Tensor; bfloat16 is rounded to nearest, ties to even, and NaN stays NaN."""
    if dtype == "float32":
        return Tensor(dtype, array.shape, array.astype("<f4", copy=False).tobytes())
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    nan = np.isnan(array)
    if nan.any():
        rounded = np.where(nan, np.uint32(0x7FC0), rounded)
    return Tensor(dtype, array.shape, rounded.astype("<u2").tobytes())


def unpack(tensor: Tensor) -> NDArray[np.float32]:
    """The values of `tensor` as float32. Read-only when no conversion was needed: it is the message's own memory."""
    if tensor.dtype == "float32":
        return np.frombuffer(tensor.data, dtype="<f4").reshape(tensor.shape)
    wide = np.frombuffer(tensor.data, dtype="<u2").astype(np.uint32) << 16
    return wide.view(np.float32).reshape(tensor.shape)


def pack_state(state: Mapping[str, NDArray[np.float32]], dtype: DType) -> dict[str, Tensor]:
    return {name: pack(array, dtype) for name, array in state.items()}


def unpack_state(tensors: Mapping[str, Tensor]) -> State:
    return {name: unpack(tensor) for name, tensor in tensors.items()}


def unpacked(tensors: Mapping[str, Tensor]) -> Made:
    """The values of `tensors` as float32, each unpacked whenever it is asked for."""
    return Made(tensors, lambda name: unpack(tensors[name]))


def digest(state: Mapping[str, NDArray[np.float32]]) -> str:
    """SHA-256 (hexadecimal) over names, shapes and float32 values in the order of the names."""
    hashed = hashlib.sha256()
    for name, array in sorted(state.items()):
        hashed.update(f"{name}\0{array.shape}\0".encode())
        hashed.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return hashed.hexdigest()
