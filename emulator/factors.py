"""LoRA's two factors by their names, and adapters of a smaller rank within larger ones.

Of B·A, with A ∈ ℝ^(R×k) and B ∈ ℝ^(d×R), the part of rank r is that of the first r rows of A and columns of B. What is
no factor (a head, DoRA's magnitudes) has no rank, and every part has all of it. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np

from farfield.protocols.tensors import Arrays, State

_A: Final = ".lora_A."
_B: Final = ".lora_B."

Shapes = dict[str, tuple[int, ...]]


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of A and B of every layer that has both, in order."""
    known = set(names)
    both = ((name, name.replace(_A, _B)) for name in sorted(known) if _A in name)
    return [(a, b) for a, b in both if b in known]


def shapes_at(shapes: Mapping[str, tuple[int, ...]], rank: int) -> Shapes:
    """The shapes of the same adapter at another rank."""
    return {name: _resized(name, shape, rank) for name, shape in shapes.items()}


def part(adapter: Arrays, whole: int, rank: int) -> State:
    """The part of `adapter`, whose rank is `whole`, that has the smaller `rank`. Views, not copies.

    A factor of any rank but `whole` is left as it is, for whoever uses it to find out.
    """
    return {
        name: array[_leading(_resized(name, array.shape, rank))] if _rank(name, array.shape) == whole else array
        for name, array in adapter.items()
    }


def padded(update: Arrays, rank: int) -> State:
    """`update`, of a part, as one of the whole adapter of this `rank`: what the part lacks does not change."""
    wide: State = {}
    for name, array in update.items():
        shape = _resized(name, array.shape, rank)
        wide[name] = array
        if shape != array.shape:
            wide[name] = np.zeros(shape, np.float32)
            wide[name][_leading(array.shape)] = array
    return wide


def _leading(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in shape)


def _rank(name: str, shape: tuple[int, ...]) -> int | None:
    return shape[0] if _A in name else shape[1] if _B in name else None


def _resized(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    if _A in name:
        return rank, *shape[1:]
    return (shape[0], rank, *shape[2:]) if _B in name else shape
