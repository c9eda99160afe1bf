"""Updates beside each other, a block of coordinates at a time: no rule holds all of them a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.tensors import State

Vector: TypeAlias = NDArray[np.float64]
Block: TypeAlias = NDArray[np.float32]

_VALUES: Final = 1 << 18
"""In a block, of all updates together."""


def by_coordinate(updates: Sequence[State], reduce: Callable[[Block], NDArray[np.floating]]) -> State:
    """What `reduce` makes of the updates: of a block [n, size], row k of update k, it makes [size]. Float32."""
    made = {name: np.empty(array.shape, np.float32) for name, array in updates[0].items()}
    for name, at, block in _blocks(updates):
        made[name].reshape(-1)[at : at + block.shape[1]] = reduce(block)
    return made


def combination(updates: Sequence[State], factors: Vector) -> State:
    """Σ cₖ Δₖ with factors c, [n]; summed in float64."""
    return by_coordinate(updates, lambda block: factors @ block.astype(np.float64))


def trimmed(updates: Sequence[State], cut: int) -> State:
    """In each coordinate, the mean of what is left without the `cut` largest and the `cut` smallest values."""

    def middle(block: Block) -> NDArray[np.floating]:
        rows = np.sort(block.T, axis=1)
        return np.asarray(rows[:, cut : len(updates) - cut].mean(axis=1, dtype=np.float64))

    return by_coordinate(updates, middle)


def median(updates: Sequence[State]) -> State:
    """In each coordinate, the middle value, or the mean of the two in the middle."""
    return trimmed(updates, (len(updates) - 1) // 2)


def distances(updates: Sequence[State], point: State) -> Vector:
    """‖Δₖ - point‖₂ over all tensors together, [n]."""
    squares = np.zeros(len(updates))
    for name, at, block in _blocks(updates):
        apart = block.astype(np.float64)
        apart -= point[name].reshape(-1)[at : at + block.shape[1]]
        squares += np.einsum("nd,nd->n", apart, apart)
    return np.sqrt(squares)


def norms(updates: Sequence[State]) -> Vector:
    """‖Δₖ‖₂ over all tensors together, [n]."""
    squares = np.zeros(len(updates))
    for _, _, block in _blocks(updates):
        squares += np.einsum("nd,nd->n", block, block, dtype=np.float64)
    return np.sqrt(squares)


def squared_distances(updates: Sequence[State]) -> Vector:
    """‖Δᵢ - Δⱼ‖², [n, n], by ‖Δᵢ‖² + ‖Δⱼ‖² - 2 ⟨Δᵢ, Δⱼ⟩ in float64; zero on the diagonal."""
    products = np.zeros((len(updates), len(updates)))
    for _, _, block in _blocks(updates):
        wide = block.astype(np.float64)
        products += wide @ wide.T
    squares = np.diag(products)
    apart = np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0)
    np.fill_diagonal(apart, 0.0)
    return apart


def _blocks(updates: Sequence[State]) -> Iterator[tuple[str, int, Block]]:
    """The name of a tensor, where in it a block begins, and the block, [n, size], a copy."""
    width = max(1, _VALUES // len(updates))
    for name, array in updates[0].items():
        flat = [update[name].reshape(-1) for update in updates]
        for at in range(0, array.size, width):
            yield name, at, np.stack([one[at : at + width] for one in flat])
